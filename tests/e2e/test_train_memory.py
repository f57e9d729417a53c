"""Memory that does not suffice for a slide: it is done again with smaller tiles, as if they had been used all along."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_train_resume import assert_same_end
from train_tiny import make_cohort, tiny_config

from wholeslide.errors import SlideError
from wholeslide.predict import evaluate_run, predict
from wholeslide.slides.view import SlideView
from wholeslide.streaming import recovery
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train
from wholeslide.train.run import Run
from wholeslide.train.signals import Interrupted
from wholeslide.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("arithmetic")

SAYING = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
FAILURES = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(SAYING)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("memory"))


def config(manifest: Path, out: Path, **options: Any) -> TrainConfig:
    """One tile a slide and stage at first, and four where memory does not suffice."""
    return tiny_config(manifest, out, **{"tile": 300, "stages": 3, **options})


class Failing:
    """Tiles that cannot be computed, on chosen calls, while a condition holds. ``calls`` counts those that it held for."""

    def __init__(self, *, when: Callable[[TileRunner], bool] = lambda _: True) -> None:
        self.calls, self.fail_on, self.when = 0, set[int](), when
        self.error: BaseException = MemoryError()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        run = TileRunner.run

        def failing(runner: TileRunner, *args: Any) -> Any:
            if self.when(runner):
                self.calls += 1
                if self.calls in self.fail_on:
                    raise self.error
            return run(runner, *args)

        patch.setattr(TileRunner, "run", failing)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "memory" in r.getMessage()]


def order(manifest: Path, epoch: int = 0) -> list[str]:
    from wholeslide.train.trainer import epoch_order

    files = pd.read_csv(manifest).query("split == 'train'")["file"].tolist()
    return [files[index] for index in epoch_order(0, epoch, len(files))]


def smaller_from_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """The reference: a run that takes smaller tiles by itself after ``step`` steps of the optimiser."""
    once = Trainer._train_slide
    taken = False

    def train_slide(self: Trainer, *args: Any, **options: Any) -> Any:
        nonlocal taken
        smaller = self.engine.plan.smaller
        if self.state.step == step and not taken and smaller is not None:
            self.engine.go_on_with(smaller)
            taken = True
        return once(self, *args, **options)

    patch.setattr(Trainer, "_train_slide", train_slide)


@pytest.fixture
def tiles_of_slides(manifest: Path, tmp_path: Path) -> Callable[[int, int], list[int]]:
    """How many tiles had been computed when each slide of an epoch began."""

    def count(accumulate: int, epochs: int) -> list[int]:
        begun: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing()
            failing.install(patch)
            step = StreamingEngine.step

            def counted(engine: StreamingEngine, *args: Any, **options: Any) -> Any:
                begun.append(failing.calls)
                return step(engine, *args, **options)

            patch.setattr(StreamingEngine, "step", counted)
            train(config(manifest, tmp_path / "counted", accumulate=accumulate, epochs=epochs))
        return begun

    return count


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("slide", "later_tiles"), [(2, 1), (3, 4)])
def test_a_slide_that_does_not_fit_is_done_again_with_smaller_tiles(
    manifest: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tiles_of_slides: Callable[[int, int], list[int]],
    accumulate: int,
    slide: int,
    later_tiles: int,
) -> None:
    """At the first or second slide of a group, before and after its earlier stages have added to the gradients."""
    first = tiles_of_slides(accumulate, 1)[slide]
    seen = Failing()
    seen.fail_on, seen.error = {first + later_tiles}, FAILURES[later_tiles % 3]
    with pytest.MonkeyPatch.context() as patch:
        seen.install(patch)
        run = train(config(manifest, tmp_path / "run", accumulate=accumulate))
    message = warnings(caplog)
    assert len(message) == 1
    assert message[0].startswith(f"not enough memory for {order(manifest)[slide]}: it is done again")
    whole = Plan.from_dict(json.loads((tmp_path / "counted" / "plan.json").read_text()))
    assert run.plan == Run.open(run.path).plan == whole.smaller
    with pytest.MonkeyPatch.context() as patch:
        smaller_from_step(patch, slide // accumulate)
        train(config(manifest, tmp_path / "reference", accumulate=accumulate))
    assert_same_end(run.path, tmp_path / "reference")
    train(config(manifest, tmp_path / "counted", accumulate=accumulate, epochs=2, resume=True))
    with pytest.raises(AssertionError):  # tiles of another size sum in another order: the test can fail
        assert_same_end(run.path, tmp_path / "counted")


def test_gradients_are_gone_before_the_plan_changes(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiles_of_slides: Callable[[int, int], list[int]]
) -> None:
    failing = Failing()
    failing.fail_on = {tiles_of_slides(2, 1)[1] + 4}
    failing.install(monkeypatch)
    collect, go_on, save, with_plan = recovery.gc.collect, StreamingEngine.go_on_with, Trainer.save, Run.with_plan
    happened: list[str] = []

    def gradients(engine: StreamingEngine) -> int:
        return sum(p.grad is not None for p in engine.network.parameters())

    predecessor = recovery.take_smaller_plan

    def watched(engine: StreamingEngine, *what: str) -> Plan:
        happened.append("failed with gradients" if gradients(engine) else "failed without")
        return predecessor(engine, *what)

    def changed(engine: StreamingEngine, plan: Plan) -> None:
        happened.append("changed with gradients" if gradients(engine) else "changed without")
        go_on(engine, plan)

    monkeypatch.setattr("wholeslide.train.trainer.take_smaller_plan", watched)
    monkeypatch.setattr(StreamingEngine, "go_on_with", changed)
    monkeypatch.setattr(recovery.gc, "collect", lambda: happened.append("collected") or collect())
    monkeypatch.setattr(Trainer, "save", lambda self: happened.append("saved") or save(self))
    monkeypatch.setattr(Run, "with_plan", lambda self, plan: happened.append("written") or with_plan(self, plan))
    train(config(manifest, tmp_path / "run", epochs=1))
    begin = happened.index("failed with gradients")
    assert happened[begin + 1 : begin + 5] == ["collected", "changed without", "saved", "written"]


def test_a_run_that_is_resumed_after_the_change_ends_in_the_same_weights(
    manifest: Path, tmp_path: Path, tiles_of_slides: Callable[[int, int], list[int]]
) -> None:
    call = tiles_of_slides(2, 1)[3] + 2
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing()
        failing.fail_on = {call}
        failing.install(patch)
        whole = train(config(manifest, tmp_path / "whole"))
        failing.calls = 0

        def leave(*args: Any, **options: Any) -> None:
            raise Interrupted(15)

        with pytest.MonkeyPatch.context() as inner:
            with_plan = Run.with_plan

            def stop_after(run: Run, plan: Plan) -> Run:
                written = with_plan(run, plan)
                if (run.path / "config.yaml").exists():
                    leave()
                return written

            inner.setattr(Run, "with_plan", stop_after)
            with pytest.raises(Interrupted):
                train(config(manifest, tmp_path / "stopped"))
    resumed = train(config(manifest, tmp_path / "stopped", resume=True))
    assert resumed.plan == whole.plan
    assert_same_end(resumed.path, whole.path)


def test_validation_that_does_not_fit_is_done_again(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(when=lambda runner: not torch.is_grad_enabled() and in_prediction)
    in_prediction = False
    predict_view = StreamingEngine.predict

    def noted(engine: StreamingEngine, view: SlideView, **options: Any) -> Any:
        nonlocal in_prediction
        in_prediction = True
        try:
            return predict_view(engine, view, **options)
        finally:
            in_prediction = False

    monkeypatch.setattr(StreamingEngine, "predict", noted)
    failing.install(monkeypatch)
    whole = train(config(manifest, tmp_path / "whole", epochs=1))
    tiles = failing.calls
    failing.calls, failing.fail_on = 0, {tiles}  # the last tile of the last slide
    run = train(config(manifest, tmp_path / "run", epochs=1))
    assert [text.split(":")[0] for text in warnings(caplog)] == ["not enough memory for slide6.png"]
    assert run.plan == whole.plan.smaller
    left, right = (load_file(r.path / "checkpoints" / r.checkpoints.pointer("last").file) for r in (run, whole))
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    logs = [pd.read_csv(r.path / "log" / "epochs.csv") for r in (run, whole)]
    np.testing.assert_allclose(logs[0]["valid_stage3_loss"], logs[1]["valid_stage3_loss"], rtol=1e-5)


def test_where_the_smallest_tiles_do_not_fit_the_state_is_saved(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiles_of_slides: Callable[[int, int], list[int]]
) -> None:
    call = tiles_of_slides(2, 1)[2] + 1
    plan = Run.open(tmp_path / "counted").plan
    with pytest.MonkeyPatch.context() as patch:
        failing = Failing()
        failing.fail_on = set(range(call, call + 1000))
        failing.install(patch)
        with pytest.raises(SlideError) as caught:
            train(config(manifest, tmp_path / "run"))
    file = order(manifest)[2]
    text = str(caught.value)
    assert text.startswith(f"not enough memory, even with the smallest tiles ({file}): end other programs")
    assert "\n" not in text
    assert "saved after step 1, go on with --resume when it is mended" in caplog.messages
    smallest = Run.open(tmp_path / "run").plan
    assert smallest.smaller is None
    sizes = []
    while plan is not None:
        sizes.append(plan)
        plan = plan.smaller
    assert sizes[-1] == smallest
    assert len(warnings(caplog)) == len(sizes) - 1
    run = train(config(manifest, tmp_path / "run", resume=True))
    assert run.checkpoints.pointer("last").state.epochs_seen == 2


@pytest.fixture(scope="module")
def trained(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(manifest, tmp_path_factory.mktemp("trained") / "run", epochs=1))


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_prediction_that_does_not_fit_is_made_again(
    manifest: Path,
    trained: Run,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    slides = [manifest.parent / f"slide{index}.png" for index in (6, 7, 8)]
    before = (trained.path / "plan.json").read_bytes()
    whole = predict(trained.path, slides)
    monkeypatch.setattr("wholeslide.train.run._read_plan", lambda path: trained.plan.smaller)
    smaller = predict(trained.path, slides)
    monkeypatch.undo()
    failing = Failing()
    failing.install(monkeypatch)
    predict(trained.path, slides[:1])
    failing.fail_on, failing.calls, failing.error = {failing.calls + 2}, 0, error  # in the second slide
    found = predict(trained.path, slides)
    assert [text.split(":")[0] for text in warnings(caplog)] == [f"not enough memory for {slides[1]}"]
    assert not found.errors
    expected = pd.concat([whole.rows[:1], smaller.rows[1:]])
    pd.testing.assert_frame_equal(found.rows, expected)
    assert (trained.path / "plan.json").read_bytes() == before


def test_a_prediction_that_never_fits_is_an_error_of_its_slide(
    manifest: Path, trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = [manifest.parent / f"slide{index}.png" for index in (6, 7)]
    failing = Failing()
    failing.install(monkeypatch)
    predict(trained.path, slides[:1])
    failing.fail_on, failing.calls = set(range(failing.calls + 1, 1000)), 0
    found = predict(trained.path, slides)
    assert [bool(error) for error in found.rows["error"]] == [False, True]
    assert f"not enough memory, even with the smallest tiles ({slides[1]})" in found.rows["error"][1]


def test_an_evaluation_that_does_not_fit_is_made_again(
    trained: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_run(trained.path, "test")
    failing = Failing()
    failing.fail_on = {3}
    failing.install(monkeypatch)
    found = evaluate_run(trained.path, "test")
    assert len(warnings(caplog)) == 1
    assert found["n"] == whole["n"]
    for stage, other in zip(found["stages"], whole["stages"], strict=True):
        assert stage["brier"]["value"] == pytest.approx(other["brier"]["value"], rel=1e-5)


def test_a_slide_that_there_is_no_room_to_read_ahead_is_read_as_it_is_needed(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(manifest, tmp_path / "whole", epochs=1))

    def no_room(self: SlideView, limit_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr(SlideView, "prefetch", no_room)
    run = train(config(manifest, tmp_path / "run", epochs=1))
    assert run.plan == whole.plan
    assert_same_end(run.path, whole.path)
