"""What happens before a run's first step: its cohort, its folder, its options, and what it is opened from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from PIL import Image
from train_tiny import make_cohort, tiny_config

from wholeslide.errors import CohortError, ConfigError, Problem, RunError, WholeslideError
from wholeslide.model.network import LocalNetwork
from wholeslide.slides.prepare import prepare
from wholeslide.slides.working import WorkingSlide, open_working_slide
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import NotEnoughMemoryError
from wholeslide.train import fitting
from wholeslide.train.loop import dry_run, train
from wholeslide.train.run import Run

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "run"
    return train(tiny_config(manifest, out))


def test_dry_run_says_what_would_happen_and_writes_nothing(manifest: Path, tmp_path: Path) -> None:
    config = tiny_config(manifest, tmp_path / "run")
    lines = dry_run(config)
    text = "\n".join(lines)
    assert lines[0] == "9 files of 9 slides of 9 patients"
    assert "  train: 5 files (a 3, b 2)" in lines
    for part in (
        "working sizes",
        "s a slide",
        "an epoch",
        "for 2 epochs",
        "memory: about",
        "for a step",
        "disk: at most about",
    ):
        assert part in text
    assert not (tmp_path / "run").exists()
    train(config)
    lines = dry_run(tiny_config(manifest, tmp_path / "run", resume=True, epochs=4))
    assert lines[0] == f"would go on with {tmp_path / 'run'} after 2 epochs and 6 steps"


def test_the_plan_stands_in_a_table_before_the_first_epoch(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = tiny_config(manifest, tmp_path / "run", epochs=1, memory="2GiB", store="disk")
    lines = dry_run(config)
    caplog.clear()
    train(config)
    assert caplog.messages[: len(lines)] == lines
    parts = [line.split("|")[0].strip() for line in lines if "|" in line]
    assert parts == ["part", "stem", "stage 1", "stage 2"]
    assert re.search(r"memory: about .* at most, of the 2\.0 GiB of --memory", "\n".join(lines))
    fields = re.search(r"receptive field of the stages' classifiers: (\d+), (\d+) px", "\n".join(lines))
    assert fields is not None
    assert 50 < int(fields[1]) < int(fields[2]) < 1000
    assert re.search(r"; [1-9]\d* KiB of features are written for the largest slide", "\n".join(lines))
    resumed = dry_run(dataclasses.replace(config, resume=True))
    assert [line for line in resumed if "|" in line] == [line for line in lines if "|" in line]


def test_the_number_of_stages_is_chosen_once(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time that is predicted; a resumed run, on whatever machine, keeps it."""
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}
    make_plan = fitting.make_plan

    def timed(network: LocalNetwork, *others: Any) -> Plan:
        return dataclasses.replace(make_plan(network, *others), seconds_per_megapixel=seconds[network.depth])

    monkeypatch.setattr(fitting, "make_plan", timed)
    config = tiny_config(manifest, tmp_path / "run", stages="auto", epochs=1)
    lines = dry_run(config)
    rows = [row for row in ([cell.strip() for cell in line.split("|")] for line in lines) if "yes" in row]
    assert [row[0] for row in rows] == ["1", "2", "4"]  # the backbone has four blocks
    assert [row[-1] for row in rows] == ["", "chosen", ""]
    run = train(config)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["stages"] == 2
    assert run.load_network().depth == 2
    seconds[4] = 0.5
    resumed = train(dataclasses.replace(config, resume=True, epochs=2))
    assert resumed.config.stages == 2
    assert "chosen" not in "\n".join(dry_run(dataclasses.replace(config, resume=True, epochs=2)))


def largest_of(manifest: Path) -> tuple[str, str]:
    """The file and the size of the image with the largest area."""
    found = []
    for path in manifest.parent.glob("*.png"):
        with Image.open(path) as image:
            found.append((image.width * image.height, path.name, f"{image.width}x{image.height}"))
    return max(found)[1:]


def test_a_cohort_that_does_not_fit_says_what_would(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is made to depend on stages, store and tile alone."""
    mib = 2**20

    def least(network: LocalNetwork, size: Any, config: StreamingConfig, *others: Any) -> int:
        return (800 // network.depth + 400 * (config.store == "host") + 50 * (config.tile is not None)) * mib

    def refuse(network: LocalNetwork, size: Any, config: StreamingConfig, *others: Any) -> Plan:
        raise NotEnoughMemoryError([Problem("no", "no", "no")], least(network, size, config))

    monkeypatch.setattr(fitting, "least_memory", least)
    monkeypatch.setattr(fitting, "make_plan", refuse)
    largest, size = largest_of(manifest)

    def said(**options: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            dry_run(tiny_config(manifest, tmp_path / "run", **options))
        return str(caught.value)

    assert said(store="host", memory="420MiB", tile=None) == (
        f"the largest slide, of {size} px, needs 0.79GiB of memory at 2 stages ({largest}, --memory 420MiB): "
        "give at least 0.79GiB, or --store disk"
    )
    assert said(memory="420MiB", tile=64).endswith("give at least 0.44GiB, or --stages 4, or no --tile")
    assert said(method="end-to-end", memory="250MiB").endswith(
        "at one stage " + f"({largest}, --memory 250MiB): give at least 0.84GiB, or --method local-k4"
    )
    assert said(memory="100MiB").endswith(": give at least 0.44GiB")
    assert said(memory="100MiB", stages="auto", tile=None) == (
        f"not enough memory for the largest slide, of {size} px, at any number of stages ({largest}, --memory 100MiB): "
        "give at least 0.20GiB, which does for --stages 4, or a coarser --mpp"
    )


def test_a_cohort_that_really_does_not_fit(manifest: Path, tmp_path: Path) -> None:
    """What the error advises does."""
    config = tiny_config(manifest, tmp_path / "run", memory="1GiB", tile=None)
    with pytest.raises(ConfigError) as caught:
        dry_run(config)
    advised = re.search(r"give at least (\S+)$", str(caught.value))
    assert advised is not None
    assert dry_run(dataclasses.replace(config, memory=advised[1]))


def test_without_a_split_one_is_drawn_and_kept(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort", train=14, valid=0, test=0)
    table = pd.read_csv(manifest)
    table.drop(columns="split").to_csv(manifest, index=False)
    run = train(tiny_config(manifest, tmp_path / "run", epochs=1))
    kept = pd.read_csv(run.path / "cohort.csv")
    assert set(kept["split"]) == {"train", "valid", "test"}
    assert kept["file"].tolist() == table["file"].tolist()


def test_folds_are_tested_one_at_a_time(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort", train=12, valid=0, test=0)
    table = pd.read_csv(manifest).drop(columns="split")
    table.assign(Fold=[index // 2 % 3 for index in range(12)]).to_csv(manifest, index=False)
    run = train(tiny_config(manifest, tmp_path / "run", fold=2, epochs=1))
    kept = run.cohort().table
    roles = kept.groupby("fold")["split"].agg(set).to_dict()
    assert roles == {"0": {"valid"}, "1": {"train"}, "2": {"test"}}
    with pytest.raises(WholeslideError) as caught:
        train(tiny_config(manifest, tmp_path / "none"))
    assert str(caught.value) == (
        "there are folds, but no fold to test on is chosen (column 'fold' of labels.csv): "
        "give --fold with its number, or remove the column to have a split drawn"
    )
    with pytest.raises(WholeslideError, match=r"no fold 3 to test on \(folds 0, 1, 2\)"):
        train(tiny_config(manifest, tmp_path / "none", fold=3))


def test_what_is_left_out_cannot_empty_a_class_of_a_drawn_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of class b there are as many slides as splits once one is left out: drawn before, that one would be missed."""
    manifest = make_cohort(tmp_path / "cohort", train=8, valid=0, test=0)
    table = pd.read_csv(manifest).drop(columns="split")
    for broken in ("slide1.png", "slide3.png", "slide5.png", "slide7.png"):
        assert table.set_index("file")["label"][broken] == "b"
        table.to_csv(manifest, index=False)
        whole = (manifest.parent / broken).read_bytes()
        (manifest.parent / broken).write_bytes(b"no image")
        config = tiny_config(manifest, tmp_path / broken, on_unreadable="exclude")
        assert "  left out, unreadable: " + broken in dry_run(config)
        assert any(line.startswith(f"{broken} is left out: ") for line in caplog.messages)
        (manifest.parent / broken).write_bytes(whole)


def test_prepared_slides_train_the_same_weights(
    manifest: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    config = tiny_config(manifest, tmp_path / "run", cache=cache)
    prepare(
        [(path, None) for path in sorted(manifest.parent.glob("*.png"))], cache, config.slide_config(), lossless=True
    )
    opened = []

    def spy(path: Path, *args: Any, **options: Any) -> WorkingSlide:
        opened.append(path.parent)
        return open_working_slide(path, *args, **options)

    monkeypatch.setattr("wholeslide.train.views.open_working_slide", spy)
    cached = train(config)
    assert set(opened) == {cache}
    assert cached.checkpoints.pointer("last").sha256 == run.checkpoints.pointer("last").sha256


def test_unreadable_slides_stop_or_are_left_out(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort", train=7)
    (manifest.parent / "slide2.png").write_bytes(b"no image")
    (manifest.parent / "slide4.png").write_bytes(b"nor this")
    with pytest.raises(CohortError) as caught:
        train(tiny_config(manifest, tmp_path / "run"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for name, line in zip(("slide2.png", "slide4.png"), lines, strict=True):
        assert name in line
        assert line.endswith("; --on-unreadable exclude goes on without it")
    assert not (tmp_path / "run").exists()
    run = train(tiny_config(manifest, tmp_path / "run", on_unreadable="exclude", epochs=1))
    assert len(run.cohort().split("train")) == 5
    excluded = pd.read_csv(run.path / "excluded.csv")
    assert excluded["file"].tolist() == ["slide2.png", "slide4.png"]
    assert not excluded["error"].str.contains("--on-unreadable").any()


def test_missing_slides_are_left_out_and_listed_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_cohort(tmp_path / "cohort", train=7)
    (manifest.parent / "slide2.png").write_bytes(b"no image")
    (manifest.parent / "slide4.png").unlink()
    run = train(tiny_config(manifest, tmp_path / "run", on_unreadable="exclude", epochs=1))
    assert len(run.cohort().split("train")) == 5
    excluded = pd.read_csv(run.path / "excluded.csv").set_index("file")["error"]
    assert excluded.index.tolist() == ["slide2.png", "slide4.png"]
    assert excluded["slide4.png"] == f"no such file ({manifest.parent / 'slide4.png'}): check the path"
    assert f"slide4.png is left out: {excluded['slide4.png']}" in caplog.messages


def test_where_every_slide_is_missing_none_is_left_out(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WholeslideError, match=r"none of the 9 files of labels\.csv is there, slide0\.png for one \("):
        train(tiny_config(manifest, tmp_path / "run", slides=tmp_path / "empty", on_unreadable="exclude"))


def test_a_run_directory_that_exists_is_not_overwritten(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    remedy = "add --resume to go on with it, or give another --out"
    with pytest.raises(WholeslideError) as caught:
        train(tiny_config(manifest, out))
    assert str(caught.value) == f"the run directory exists ({out}): {remedy}"
    with pytest.raises(RunError) as resumed:
        train(tiny_config(manifest, out, resume=True))
    assert str(resumed.value) == f"not a run directory, it has no config.yaml ({out}): give the run's own --out"


def test_quick_problems_are_reported_together(manifest: Path, tmp_path: Path) -> None:
    config = tiny_config(
        manifest,
        manifest,
        slides=tmp_path / "nowhere",
        method="clam",
        devices=2,
        lr=-1.0,
        backbone="resnet_unheard_of",
        memory="8 elephants",
        store_dir=tmp_path / "no disk",
        fractions=(0.5, 0.5, 0.5),
        loggers=("csv", "wandb"),
    )
    with pytest.raises(WholeslideError) as caught:
        train(config)
    text = str(caught.value)
    for part in (
        "unknown method 'clam' (--method): choose local-kN with N stages (local-k4), or one of local, ",
        "training on 2 is not supported (--devices): leave --devices at 1",
        "-1.0 is no learning rate (--lr)",
        f"a file is in the way ({manifest}): give another --out",
        f"({tmp_path / 'nowhere'})",
        "resnet_unheard_of",
        "not a size of memory (--memory 8 elephants)",
        f"no such folder (--store-dir {tmp_path / 'no disk'}): make it, or name another",
        "the logger 'wandb' is not installed (--loggers): run `pip install wholeslide[wandb]`, or leave it out",
        "not a split (--fractions 0.5,0.5,0.5)",
    ):
        assert text.count(part) == 1, part


def test_what_two_checks_find_is_said_once(tmp_path: Path) -> None:
    manifest = make_cohort(tmp_path / "cohort", train=8, valid=0, test=0)
    pd.read_csv(manifest).drop(columns="split").to_csv(manifest, index=False)
    with pytest.raises(WholeslideError, match="not a split") as caught:
        train(tiny_config(manifest, tmp_path / "run", fractions=(0.5, 0.5, 0.5)))
    assert len(caught.value.problems) == 1


def test_options_of_the_parts_are_checked(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a resolution"):
        tiny_config(manifest, tmp_path, mpp=400.0).check()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace("format_version: 1", "format_version: 9"), "format version 9 is unknown"),
        (lambda text: text[:5], "config.yaml is damaged"),
        (lambda text: ": [", "config.yaml is damaged"),
    ],
)
def test_a_damaged_config_is_refused(
    manifest: Path, tmp_path: Path, run: Run, damage: Callable[[str], str], expected: str
) -> None:
    (tmp_path / "config.yaml").write_text(damage((run.path / "config.yaml").read_text()))
    (tmp_path / "plan.json").write_bytes((run.path / "plan.json").read_bytes())
    with pytest.raises(RunError, match=expected):
        Run.open(tmp_path)


def test_a_missing_plan_is_refused(tmp_path: Path, run: Run) -> None:
    (tmp_path / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())
    with pytest.raises(RunError, match=r"plan\.json is missing or damaged"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="not a run directory"):
        Run.open(tmp_path / "nowhere")


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, run: Run) -> None:
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "stages": 3}))
    for name in ("plan.json", "checkpoints"):
        (tmp_path / name).symlink_to(run.path / name)
    with pytest.raises(RunError, match=r"does not fit the network that config\.yaml describes"):
        Run.open(tmp_path).load_network()
