"""A run that is killed, stopped or prolonged ends in the same weights, bit by bit, as one that never was."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from train_tiny import make_cohort, tiny_config, train_in_child

from wholeslide.errors import ConfigError, RunError, SlideError
from wholeslide.slides.view import SlideView
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train
from wholeslide.train.signals import Interrupted
from wholeslide.train.trainer import Trainer
from wholeslide.train.validation import Score
from wholeslide.train.views import Entry, ViewSource

pytestmark = pytest.mark.usefixtures("arithmetic")

TIMES = ["seconds", "wait_seconds", "memory_bytes", "training_seconds"]


@pytest.fixture(scope="module")
def whole_run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of two epochs that is never interrupted, for each schedule."""

    @functools.cache
    def trained(schedule: str) -> Path:
        out = tmp_path_factory.mktemp("whole") / schedule
        train(tiny_config(manifest, out, schedule=schedule))
        return out

    return trained


def assert_same_end(run: Path, other: Path) -> None:
    """Weights, the optimiser, the loop's state and the logs are equal."""
    for which in ("last", "best"):
        left, right = (json.loads((path / "checkpoints" / f"{which}.json").read_text()) for path in (run, other))
        tensors, others = (
            load_file(path / "checkpoints" / record["file"]) for path, record in ((run, left), (other, right))
        )
        assert tensors.keys() == others.keys()
        assert any(key.startswith("optimizer:") for key in tensors)
        for key, value in tensors.items():
            assert torch.equal(value, others[key]), key
        for record in (left, right):
            del record["state"]["seconds"]
        assert left == right
    for name in ("slides.csv", "epochs.csv"):
        tables = [pd.read_csv(path / "log" / name).drop(columns=TIMES, errors="ignore") for path in (run, other)]
        pd.testing.assert_frame_equal(*tables)


Whole = Callable[[str], Path]
schedules = pytest.mark.parametrize("schedule", ["simultaneous", "sequential"])


@schedules
def test_killed_at_random_moments_ends_in_the_same_weights(
    manifest: Path, tmp_path: Path, whole_run: Whole, schedule: Any
) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["wholeslide.train.loop", "train_tiny"])
    config = tiny_config(manifest, tmp_path / "killed", resume=True, schedule=schedule, checkpoint_minutes=0)
    moments = random.Random(os.getpid())
    sealed, kills = tmp_path / "killed" / "config.yaml", 0
    while True:
        child = server.Process(target=train_in_child, args=(config,))
        child.start()
        while child.is_alive() and not sealed.exists():
            child.join(0.01)
        child.join(
            moments.uniform(0, 0.1 + 0.4 * kills) if kills < 3 else None
        )  # early at first: the whole run is short
        if not child.is_alive():
            break
        child.kill()
        child.join()
        kills += 1
    assert child.exitcode == 0
    assert kills > 0, "never killed: the test says nothing"
    assert_same_end(tmp_path / "killed", whole_run(schedule))


class Killed(BaseException):
    """Stands for SIGKILL at a chosen moment: nothing catches it."""


def kill_at_write(monkeypatch: pytest.MonkeyPatch, count: int, *, before: bool) -> None:
    """Die before or after the ``count``-th swap of a file in the folder of checkpoints."""
    replace, done = Path.replace, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal done
        if target.parent.name != "checkpoints":
            return replace(self, target)
        done += 1
        if done == count and before:
            raise Killed
        result = replace(self, target)
        if done == count:
            raise Killed
        return result

    monkeypatch.setattr(Path, "replace", dying)


@schedules
def test_killed_around_writes_ends_in_the_same_weights(
    manifest: Path, tmp_path: Path, whole_run: Whole, monkeypatch: pytest.MonkeyPatch, schedule: Any
) -> None:
    """Between the swaps of tensors and pointers, which random moments hit too rarely."""
    config = tiny_config(manifest, tmp_path / "killed", resume=True, schedule=schedule, checkpoint_minutes=0)
    kills = 0
    while kills < 30:
        with monkeypatch.context() as patch:
            kill_at_write(patch, 5 + kills % 3, before=kills % 2 == 0)
            try:
                train(config)
            except Killed:
                kills += 1
                continue
        break
    assert kills > 2
    assert_same_end(tmp_path / "killed", whole_run(schedule))


@pytest.mark.slow
@schedules
@pytest.mark.parametrize("before", [True, False])
def test_killed_around_any_one_write_ends_in_the_same_weights(
    manifest: Path, tmp_path: Path, whole_run: Whole, monkeypatch: pytest.MonkeyPatch, schedule: Any, before: bool
) -> None:
    count, finished = 0, False
    while not finished:
        count += 1
        config = tiny_config(manifest, tmp_path / f"{count}", resume=True, schedule=schedule, checkpoint_minutes=0)
        with monkeypatch.context() as patch:
            kill_at_write(patch, count, before=before)
            try:
                train(config)
                finished = True
            except Killed:
                finished = False
        train(config)
        assert_same_end(config.out, whole_run(schedule))
    assert count > 10


def test_joined_runs_equal_one(manifest: Path, tmp_path: Path, whole_run: Whole) -> None:
    """N + M epochs, the second part begun by prolonging the first."""
    train(tiny_config(manifest, tmp_path / "joined", epochs=1))
    run = train(tiny_config(manifest, tmp_path / "joined", epochs=2, resume=True))
    assert run.config.epochs == 2
    assert_same_end(tmp_path / "joined", whole_run("simultaneous"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(
    manifest: Path,
    tmp_path: Path,
    whole_run: Whole,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    """In the middle of a group: what the group has accumulated is thrown away, nothing else."""
    step = StreamingEngine.step
    calls = 0

    def signalled(self: StreamingEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(self, *args, **kwargs)
        if calls == 3:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(StreamingEngine, "step", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    assert caught.value.exit_status == status
    assert calls == 3
    assert signal.getsignal(number) == before
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == (1, 2, 2)
    monkeypatch.undo()
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))


@pytest.mark.parametrize(
    ("computing", "call", "slow", "done"),
    [("step", 3, 4, (1, 2, 2)), ("predict", 1, 7, (3, 5, 5))],
    ids=["training", "validation"],
)
def test_a_signal_saves_before_the_slide_that_is_read_ahead_is_there(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    computing: str,
    call: int,
    slow: int,
    done: tuple[int, int, int],
) -> None:
    """The ``slow``-th slide to be opened, while the one before is computed on, is not there before the state is saved."""
    open_view, compute, save = ViewSource.open, getattr(StreamingEngine, computing), Trainer.save
    reading, saved = threading.Event(), threading.Event()
    opened, calls, in_time = 0, 0, False

    def waits(self: ViewSource, entry: Entry, draws: Any = None) -> SlideView:
        nonlocal opened, in_time
        opened += 1
        if opened == slow:
            reading.set()
            in_time = saved.wait(timeout=5)
        return open_view(self, entry, draws)

    def signalled(self: StreamingEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            assert reading.wait(timeout=20)
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    def told(self: Trainer) -> None:
        save(self)
        if reading.is_set():
            saved.set()

    monkeypatch.setattr(ViewSource, "open", waits)
    monkeypatch.setattr(StreamingEngine, computing, signalled)
    monkeypatch.setattr(Trainer, "save", told)
    with pytest.raises(Interrupted):
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    assert in_time
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == done


def test_a_signal_in_validation_saves_the_trained_epoch(
    manifest: Path, tmp_path: Path, whole_run: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = StreamingEngine.predict

    def signalled(self: StreamingEngine, view: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, view)

    monkeypatch.setattr(StreamingEngine, "predict", signalled)
    with pytest.raises(Interrupted):
        train(tiny_config(manifest, tmp_path / "stopped"))
    monkeypatch.undo()
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["epoch"]) == (3, 5, 0)
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))


@pytest.mark.parametrize(("in_validation", "done"), [(False, (1, 2, 2)), (True, (3, 5, 5))])
def test_a_slide_that_can_no_longer_be_read_saves_what_was_done(
    manifest: Path,
    tmp_path: Path,
    whole_run: Whole,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_validation: bool,
    done: tuple[int, int, int],
) -> None:
    """The fourth slide that is trained on, in the middle of a group, or the first of the validation."""
    open_view, opened = ViewSource.open, 0

    def unreadable(self: ViewSource, entry: Entry, draws: Any = None) -> SlideView:
        nonlocal opened
        opened += 1
        if draws is None if in_validation else opened == 4:
            raise SlideError.single("cannot be read", where=entry.file, remedy="copy it again")
        return open_view(self, entry, draws)

    monkeypatch.setattr(ViewSource, "open", unreadable)
    with pytest.raises(SlideError, match="cannot be read"):
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    monkeypatch.undo()
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == done
    assert f"saved after step {done[0]}, go on with --resume when it is mended" in caplog.messages
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))


def test_a_finished_run_is_left_as_it_is(manifest: Path, tmp_path: Path) -> None:
    config = tiny_config(manifest, tmp_path / "run", epochs=1)
    train(config)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    record = (tmp_path / "run" / "checkpoints" / "last.json").read_text()
    train(dataclasses.replace(config, resume=True))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == names
    assert (tmp_path / "run" / "checkpoints" / "last.json").read_text() == record


def test_a_name_with_a_line_break(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort")
    (manifest.parent / "slide1.png").rename(manifest.parent / "slide\n1.png")
    manifest.write_text(manifest.read_text().replace("slide1.png", '"slide\n1.png"'))
    config = tiny_config(manifest, tmp_path / "run", epochs=1)
    train(config)
    run = train(dataclasses.replace(config, resume=True, epochs=2))
    table = pd.read_csv(run.path / "log" / "slides.csv")
    assert len(table) == 10
    assert (table["file"] == "slide\n1.png").sum() == 2


def test_resuming_where_nothing_is_begins(manifest: Path, tmp_path: Path) -> None:
    run = train(tiny_config(manifest, tmp_path / "run", epochs=1, resume=True))
    assert run.checkpoints.pointer("last").state.epoch == 1


def test_two_processes_on_one_run_directory(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(manifest, tmp_path / "run", epochs=1)
    refusal = f"another process is writing into this folder ({config.out}): wait until it has ended"
    fit = Trainer.fit

    def met(self: Trainer) -> None:
        expect_run_error(dataclasses.replace(config, resume=True), refusal)
        fit(self)

    monkeypatch.setattr(Trainer, "fit", met)
    train(config)
    monkeypatch.undo()
    train(dataclasses.replace(config, resume=True))
    assert not list(config.out.glob(".*"))


def test_a_run_that_another_process_began_meanwhile(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the slides were checked: it is gone on with, or not overwritten."""
    config = tiny_config(manifest, tmp_path / "run", epochs=1)
    train(dataclasses.replace(config, out=tmp_path / "first"))
    record = (tmp_path / "first" / "checkpoints" / "last.json").read_bytes()

    def overtaken(prepared: Any) -> list[str]:
        (tmp_path / "first").rename(config.out)
        return []

    monkeypatch.setattr("wholeslide.train.loop.describe", overtaken)
    expect_run_error(config, "the run directory exists", "add --resume to go on with it")
    config.out.rename(tmp_path / "first")
    train(dataclasses.replace(config, resume=True))
    assert (config.out / "checkpoints" / "last.json").read_bytes() == record


def test_resuming_with_other_options_is_refused(manifest: Path, tmp_path: Path) -> None:
    train(tiny_config(manifest, tmp_path / "run", epochs=1))
    with pytest.raises(ConfigError) as caught:
        train(tiny_config(manifest, tmp_path / "run", epochs=1, lr=5e-4, accumulate=3, resume=True))
    remedy = "resume with the options that the run began with, or begin another in a new --out"
    assert str(caught.value).splitlines() == [
        f"0.0005 is asked for, but the run began with 0.001 (--lr): {remedy}",
        f"3 is asked for, but the run began with 2 (--accumulate): {remedy}",
    ]


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


def checkpoint_file(run: Path, which: str = "last") -> Path:
    return run / "checkpoints" / json.loads((run / "checkpoints" / f"{which}.json").read_text())["file"]


def expect_run_error(config: TrainConfig, *parts: str) -> None:
    with pytest.raises(RunError) as caught:
        train(config)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoints_are_refused(manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(manifest, run, epochs=1))
    again = tiny_config(manifest, run, epochs=2, resume=True)
    last, record = checkpoint_file(run), run / "checkpoints" / "last.json"
    whole, pointer = last.read_bytes(), record.read_bytes()

    last.write_bytes(whole[: len(whole) // 2])
    expect_run_error(again, "the checkpoint is truncated or changed", str(last), "put back a copy of it")
    last.unlink()
    expect_run_error(again, "the checkpoint is missing", str(last))
    last.write_bytes(whole)
    record.write_bytes(pointer[:50])
    expect_run_error(again, "the checkpoint's record is damaged", str(record))
    record.write_bytes(pointer.replace(b'"format_version": 1', b'"format_version": 7'))
    expect_run_error(again, "format version 7 is unknown", str(record), "use the one that config.yaml names")
    record.write_bytes(pointer)
    train(again)


def test_the_remedy_for_a_damaged_last_checkpoint_works(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying best.json over last.json, as the error says, goes on from the best epoch."""
    monkeypatch.setattr(Score, "better_than", lambda self, best: best is None)
    run = tmp_path / "run"
    train(tiny_config(manifest, run))
    end = checkpoint_file(run).read_bytes()
    damage(checkpoint_file(run), lambda content: content[:-1])
    again = tiny_config(manifest, run, resume=True)
    expect_run_error(again, "copy best.json over last.json to use step 3 instead")
    (run / "checkpoints" / "last.json").write_bytes((run / "checkpoints" / "best.json").read_bytes())
    train(again)
    assert checkpoint_file(run).read_bytes() == end


def test_a_full_disk_leaves_the_last_good_checkpoint(
    manifest: Path, tmp_path: Path, whole_run: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files makes the real writer fail in the middle of a file, as a full disk does."""
    import resource

    run = tmp_path / "run"
    step = Trainer._step
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(self: Trainer, group: Any) -> None:
        if self.state.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        step(self, group)

    monkeypatch.setattr(Trainer, "_step", fill_up)
    try:
        expect_run_error(
            tiny_config(manifest, run, checkpoint_minutes=0),
            f"the disk is full ({run / 'checkpoints'})",
            "free some space and begin again, with --resume",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert not list((run / "checkpoints").glob("*.part"))
    train(tiny_config(manifest, run, resume=True))
    assert_same_end(run, whole_run("simultaneous"))
