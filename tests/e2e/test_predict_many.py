"""Many slides, some of them broken, shared by several processes, killed and gone on with: the same file comes out."""

from __future__ import annotations

import csv
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from cli_cases import TINY_TRAINING, Outcome, call, cohort, picture, predicted, refused
from PIL import Image

from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.predict import table as tables
from wholeslide.predict.output import PredictionOutput
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import make_plan

pytestmark = pytest.mark.usefixtures("arithmetic")

SEVERAL = [sys.executable, "-m", "wholeslide"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "wholeslide"]
COUNT, BROKEN = 40, (7, 30)


def small_slides(folder: Path, count: int, broken: tuple[int, ...]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(120, 255, size=(48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    for index in broken:
        (folder / f"{index:03}.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a backbone that any process knows."""
    folder = tmp_path_factory.mktemp("trained")
    training = ["test_resnet" if word == "resnet_micro" else word for word in TINY_TRAINING]
    words = ["--slides", folder, "--out", folder / "run", *training, "--first-stride", 2, "--mpp", "native"]
    assert call("train", cohort(folder), *words, "--epochs", 1).status == 0
    return folder / "run"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_slides(tmp_path_factory.mktemp("many") / "slides", COUNT, BROKEN)


@pytest.fixture(scope="module")
def whole(run: Path, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out.csv"
    outcome = call("predict", run, slides, "--out", out, "--quiet")
    check_outcome(outcome, out, count=COUNT, broken=BROKEN)
    return out.read_bytes()


def check_outcome(outcome: Outcome, out: Path, *, count: int, broken: tuple[int, ...]) -> None:
    """A row a slide, in order; one bad slide costs one row with an error, one line on stderr, and the status."""
    assert outcome.status == 2
    assert outcome.out.endswith(f" {len(broken)} could not be read: {out}\n")
    table = predicted(out)
    assert [Path(file).name for file in table["file"]] == [f"{index:03}.png" for index in range(count)]
    assert tuple(table.index[table["error"] != ""]) == broken
    assert sorted(table["error"][list(broken)]) == sorted(outcome.errors)
    assert (table["prediction"] != "").sum() == (table["prob_a"] != "").sum() == count - len(broken)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.csv", "out.csv.made-with.json"]


def start(program: list[str], *words: object, **variables: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    command = [*program, *map(str, words), "--quiet"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    started.append(child)
    return child


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Also where a test fails in the middle."""
    yield
    while started:
        with started.pop() as child:
            child.kill()


def finished(child: subprocess.Popen[str]) -> Outcome:
    out, err = child.communicate(timeout=300)
    return Outcome(child.returncode, out, err.splitlines())


def rows_known(out: Path) -> int:
    """What a user finds while predictions go on: rows in the table, and beside it."""
    files = [*([out] if out.exists() else []), *out.parent.glob("out.csv.rows/*.csv")]
    return sum(len(list(csv.DictReader(io.StringIO(file.read_text())))) for file in files)


def stop_in_the_middle(child: subprocess.Popen[str], out: Path, *, after: int, number: int = signal.SIGKILL) -> int:
    """Signal the first process alone; all of its processes end. Returns the number of rows that are left."""
    while child.poll() is None and rows_known(out) < after:
        time.sleep(0.005)
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(number)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    child.communicate(timeout=60)
    return rows_known(out)


def test_two_processes_give_the_file_of_one(run: Path, slides: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    outcome = finished(start(SEVERAL, "predict", run, slides, "--out", out, "--devices", 2))
    check_outcome(outcome, out, count=COUNT, broken=BROKEN)
    assert outcome.out == f"{COUNT - len(BROKEN)} slides predicted, {len(BROKEN)} could not be read: {out}\n"
    assert all(line.startswith(("error: ", "warning: ")) for line in outcome.err), outcome.err
    assert out.read_bytes() == whole


def test_torchrun_says_how_many_there_are(run: Path, slides: Path, whole: bytes, tmp_path: Path) -> None:
    """A slide alone takes one process; the other has none."""
    out = tmp_path / "out.csv"
    outcome = finished(start(TORCHRUN, "predict", run, slides / "000.png", "--out", out))
    assert (outcome.status, outcome.errors) == (0, []), outcome
    assert outcome.out == f"1 slides predicted, 0 could not be read: {out}\n"
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


SRUN = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_NNODES": 1}


@pytest.mark.slow
@pytest.mark.parametrize("by", ["srun", "hand"])
def test_processes_that_others_start(run: Path, slides: Path, whole: bytes, tmp_path: Path, by: str) -> None:
    """By SLURM's variables, and on two machines by hand; only rank 0 ends with 2."""
    out, port = tmp_path / "out.csv", free_port()
    children = []
    for rank in (0, 1):
        variables = {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if by == "srun":
            variables |= SRUN | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0}
        words = ["predict", run, slides, "--out", out, *(["--nodes", 2] if by == "hand" else [])]
        children.append(start(SEVERAL, *words, **variables))
    first, second = map(finished, children)
    assert (first.status, second.status, second.out) == (2, 0, ""), second
    both = Outcome(first.status, first.out, first.err + second.err)
    check_outcome(both, out, count=COUNT, broken=BROKEN)
    assert out.read_bytes() == whole


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_what_is_wrong_with_the_inputs_is_told_once(slides: Path, tmp_path: Path) -> None:
    outcome = finished(start(SEVERAL, "predict", slides, slides, "--out", tmp_path / "out.csv", "--devices", 2))
    assert outcome.status == 2
    assert [error.partition(" (")[0] for error in outcome.errors] == ["not a run directory, it has no config.yaml"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--devices", 2], ["--nodes", 2]])
def test_several_processes_need_a_file(run: Path, slides: Path, words: list[object]) -> None:
    problem = "the rows of several processes would mix on stdout (--out): name a file for them"
    assert refused("predict", run, slides, *words) == [problem]


def test_numbers_of_processes_that_make_no_sense(run: Path, slides: Path) -> None:
    assert refused("predict", run, slides, "--devices", 0, "--nodes", -1) == [
        "0 is too small (--devices): give 1 or more",
        "-1 is too small (--nodes): give 1 or more",
    ]


def test_a_killed_run_goes_on_to_the_same_file(run: Path, slides: Path, whole: bytes, tmp_path: Path) -> None:
    """And a second one is refused until the first has ended."""
    out = tmp_path / "out.csv"
    words = ["predict", run, slides, "--out", out]
    child = start(SEVERAL, *words)
    while not (tmp_path / "out.csv.lock").exists() and child.poll() is None:
        time.sleep(0.005)
    assert refused(*words, "--resume", "--quiet") == [
        f"another process is writing this file ({out}): wait until it has ended, or give another --out"
    ]
    left = stop_in_the_middle(child, out, after=3)
    assert 3 <= left < COUNT
    outcome = call(*words, "--resume", "--quiet")
    check_outcome(outcome, out, count=COUNT, broken=BROKEN)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_processes_go_on_in_another_number(
    run: Path, slides: Path, whole: bytes, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out.csv"
    words = ["predict", run, slides, "--out", out]
    left = stop_in_the_middle(start(SEVERAL, *words, "--devices", 2), out, after=3, number=number)
    assert 3 <= left < COUNT
    assert (tmp_path / "out.csv.rows").exists()
    outcome = call(*words, "--resume", "--quiet")
    check_outcome(outcome, out, count=COUNT, broken=BROKEN)
    assert out.read_bytes() == whole


def check_what_a_kill_left(run: Path, slides: Path, whole: bytes, out: Path) -> None:
    """Rows in whatever order, in the table and beside it, of which the last ones were cut off, make the same file."""
    lines = whole.splitlines(keepends=True)
    call("predict", run, slides / "000.png", "--out", out, "--quiet")  # for the record
    for path, numbers, cut in ((out, (9, 5, 1), -20), (out.parent / "out.csv.rows" / "1.csv", (33, 4, 2), -1)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((lines[0] + b"".join(lines[number] for number in numbers))[:cut])
    record = out.with_name("out.csv.made-with.json")
    record.write_text(
        record.read_text().replace('"slides": {', f'"slides": {{{names(slides, (9, 5, 33, 4, 2))},'), encoding="utf-8"
    )
    outcome = call("predict", run, slides, "--out", out, "--resume", "--quiet")
    assert "slides predicted, 4 before," in outcome.out, outcome
    check_outcome(outcome, out, count=COUNT, broken=BROKEN)
    assert out.read_bytes() == whole


def names(slides: Path, numbers: tuple[int, ...]) -> str:
    paths = [str(slides / f"{number - 1:03}.png") for number in numbers]
    return ",".join(f'"{path}": "{path}"' for path in paths)


def test_what_a_kill_left_is_taken_up(run: Path, slides: Path, whole: bytes, tmp_path: Path) -> None:
    check_what_a_kill_left(run, slides, whole, tmp_path / "out.csv")


def as_they_came(output: PredictionOutput, rows: list[tables.Row]) -> None:
    output._write([*output.rows, *(row for row in rows if row["file"] not in output.done)])


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("wholeslide.predict.table.whole_rows", lambda content: content),
        ("wholeslide.predict.output.PredictionOutput.finish", as_they_came),
        ("wholeslide.predict.output._unfinished", lambda table: []),
    ],
    ids=["torn rows", "order", "rows beside"],
)
def test_the_check_can_fail(
    place: str,
    fault: Callable[..., object],
    run: Path,
    slides: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, fault)
    with pytest.raises(AssertionError):
        check_what_a_kill_left(run, slides, whole, tmp_path / "out.csv")


def test_memory_is_planned_for_all_slides(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a resumed run, whose largest slide is done, would have other tiles than one that was not interrupted."""
    out, large, small = tmp_path / "out.csv", tmp_path / "large.png", tmp_path / "small.png"
    picture(large, 300, 280)
    small.write_bytes(b"not yet")
    largest: list[Size] = []

    def noted(network: LocalNetwork, size: Size, *others: Any, **options: Any) -> Plan:
        largest.append(size)
        return make_plan(network, size, *others, **options)

    monkeypatch.setattr("wholeslide.predict.engine.make_plan", noted)
    words = ["predict", run, large, small, "--out", out, "--memory", "2GiB", "--resume", "--quiet"]
    assert call(*words).status == 2
    picture(small, 48, 48)
    outcome = call(*words)
    assert outcome.out == f"1 slides predicted, 1 before, 0 could not be read: {out}\n"
    assert largest == [Size(300, 280)] * 2


@pytest.mark.slow
def test_five_hundred(run: Path, tmp_path: Path) -> None:
    """495 predictions and five errors, by one process, and by two that are killed in the middle and begun again."""
    broken = (0, 99, 123, 250, 499)
    slides = small_slides(tmp_path / "slides", 500, broken)
    one, other = tmp_path / "one" / "out.csv", tmp_path / "other" / "out.csv"
    check_outcome(call("predict", run, slides, "--out", one, "--quiet"), one, count=500, broken=broken)
    words = ["predict", run, slides, "--out", other, "--devices", 2]
    left = stop_in_the_middle(start(SEVERAL, *words), other, after=200)
    assert 200 <= left < 500
    check_outcome(finished(start(SEVERAL, *words, "--resume")), other, count=500, broken=broken)
    assert other.read_bytes() == one.read_bytes()
