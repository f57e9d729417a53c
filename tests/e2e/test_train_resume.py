"""A run that is killed, stopped or prolonged ends in the same weights, bit by bit, as one that never was."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from train_tiny import Whole, assert_same_end, make_cohort, tiny_config, train_in_child

from wholeslide.errors import ConfigError, RunError
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train
from wholeslide.train.trainer import Trainer
from wholeslide.train.validation import Score

pytestmark = pytest.mark.usefixtures("arithmetic")


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
