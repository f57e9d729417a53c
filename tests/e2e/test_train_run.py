"""What a training run does and leaves, on a network of a few thousand weights."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from train_tiny import tiny_config

from wholeslide.draws import Draws
from wholeslide.errors import RunError, SlideError
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.step import StepResult
from wholeslide.train.inference import predict_slides
from wholeslide.train.loop import train
from wholeslide.train.run import Run
from wholeslide.train.trainer import Trainer, epoch_order
from wholeslide.train.views import ViewSource, entries

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "run"
    return train(tiny_config(manifest, out, loggers=("csv", "tensorboard"), class_weights="balanced"))


def test_what_a_run_holds(run: Run) -> None:
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert {"config.yaml", "plan.json", "cohort.csv", "log/slides.csv", "log/epochs.csv"} <= names
    assert {"checkpoints/last.json", "checkpoints/best.json"} <= names
    assert any(name.startswith("log/events.out.tfevents") for name in names)
    record = json.loads((run.path / "checkpoints" / "last.json").read_text())
    assert record["file"] == f"step-{record['step']}.safetensors"
    assert record["step"] == 6  # two epochs of five slides in groups of 2, 2, 1
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["format_version"] == 1
    assert config["seed"] == 0
    assert Path(config["slides"]).is_absolute()
    assert set(config["versions"]) == {"wholeslide", "torch", "timm", "python"}
    assert config["classes"] == ["a", "b"]
    assert config["class_weighting"] == pytest.approx([5 / 6, 5 / 4])


def test_opening_a_run_gives_back_what_was_made(run: Run) -> None:
    opened = Run.open(run.path)
    assert opened == run
    pd.testing.assert_frame_equal(opened.cohort().table, run.cohort().table)


def test_logs_hold_every_stage(run: Run) -> None:
    slides = pd.read_csv(run.path / "log" / "slides.csv")
    assert slides["slides_seen"].tolist() == list(range(1, 11))
    assert slides["step"].tolist() == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6]
    for column in ("stage1_classification_loss", "stage2_classification_loss", "stage1_reconstruction_loss"):
        assert np.isfinite(slides[column]).all()
    assert (slides[["seconds", "memory_bytes"]] > 0).all(axis=None)
    epochs = pd.read_csv(run.path / "log" / "epochs.csv")
    assert epochs["epochs_seen"].tolist() == [1, 2]
    means = slides.groupby("epoch")["stage2_classification_loss"].mean()
    assert epochs["stage2_classification_loss"].tolist() == pytest.approx(means.tolist())
    for stage in (1, 2):
        assert {f"valid_stage{stage}_{name}" for name in ("loss", "auroc", "accuracy")} <= set(epochs.columns)


def test_statistics_are_the_training_tissues(run: Run, manifest: Path) -> None:
    from PIL import Image

    training = run.cohort().split("train")["path"]
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in training]) / 255
    assert run.tissue.pixel_mean == pytest.approx(pixels.mean(axis=0), abs=1e-6)
    assert run.tissue.pixel_std == pytest.approx(pixels.std(axis=0), abs=1e-6)
    network = run.load_network("last")
    assert network.pixel_mean.tolist() == pytest.approx(run.tissue.pixel_mean)


def test_best_and_last_predict_what_was_validated(run: Run) -> None:
    epochs = pd.read_csv(run.path / "log" / "epochs.csv")
    state = run.checkpoints.pointer("best").state
    assert state.best is not None
    assert state.best.epoch == epochs["epochs_seen"][epochs["valid_stage2_loss"].idxmin()]
    for which, epoch in (("best", state.best.epoch), ("last", 2)):
        engine = run.learner(run.load_network(which), torch.device("cpu"))
        final, by_stage = predict_slides(
            engine, run.cohort().split("valid"), run.source(engine.network), classes=run.classes
        )
        assert list(final.columns) == ["file", "slide", "patient", "label", "prediction", "prob_a", "prob_b"]
        assert by_stage["stage"].tolist() == [1, 2, 1, 2]
        chosen = [row[f"prob_{row['label']}"] for row in final.to_dict("records")]
        assert -np.log(chosen).mean() == pytest.approx(epochs["valid_stage2_loss"][epoch - 1], rel=1e-6)


def test_a_file_that_cannot_be_read_is_passed_on_or_raised(run: Run, tmp_path: Path) -> None:
    table = run.cohort().split("valid").copy()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    table.iloc[0, table.columns.get_loc("path")] = str(bad)
    engine = run.learner(run.load_network(), torch.device("cpu"))
    met = []
    final, _ = predict_slides(
        engine,
        table,
        run.source(engine.network),
        classes=run.classes,
        on_error=lambda entry, error: met.append((entry, error)),
    )
    assert final["file"].tolist() == [table["file"].iloc[1]]
    assert met[0][0].file == table["file"].iloc[0]
    with pytest.raises(SlideError, match=r"bad\.png"):
        predict_slides(engine, table, run.source(engine.network), classes=run.classes)


def test_an_answer_that_is_not_a_number_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = run.learner(run.load_network("best"), torch.device("cpu"))
    monkeypatch.setattr(engine, "predict", lambda _view, **_: np.full((2, 2), np.nan))
    with pytest.raises(
        SlideError, match=r"the network's answer is not a number \(.*\.png\): the weights have diverged"
    ):
        predict_slides(engine, run.cohort().split("valid"), run.source(engine.network), classes=run.classes)


def test_the_test_split_is_not_touched(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = ViewSource.open

    def spy(self: ViewSource, entry: Any, *args: Any) -> Any:
        opened.append(entry.file)
        return original(self, entry, *args)

    monkeypatch.setattr(ViewSource, "open", spy)
    run = train(tiny_config(manifest, tmp_path / "run", epochs=1))
    splits = run.cohort().table.set_index("file")["split"]
    assert {splits[name] for name in opened} == {"train", "valid"}


def test_each_group_steps_on_the_mean_of_its_gradients(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of 3 and 2: no gradient is left over, and the smaller group is divided by its own size."""
    groups: list[tuple[list[str], list[torch.Tensor], dict[str, Any]]] = []
    original = Trainer._step

    def spy(self: Trainer, group: Any) -> None:
        gradients = [p.grad.clone() for p in self.network.parameters() if p.grad is not None]
        weights = {key: value.clone() for key, value in self.network.state_dict().items()}
        groups.append(([slide.entry.file for slide in group], gradients, weights))
        original(self, group)
        assert all(p.grad is None for p in self.network.parameters())

    monkeypatch.setattr(Trainer, "_step", spy)
    run = train(tiny_config(manifest, tmp_path / "run", epochs=1, accumulate=3))
    assert [len(files) for files, _, _ in groups] == [3, 2]

    rows = {entry.file: entry for entry in entries(run.cohort().table)}
    network = run.build_network(pretrained=False)
    engine = StreamingEngine(network, run.plan, torch.device("cpu"))
    views = ViewSource(
        run.slide_config, network.padded_size, None, run.config.augmentation_config(), run.tissue.mean_grey
    )
    for files, gradients, weights in groups:
        network.load_state_dict(weights)
        singles = []
        for file in files:
            network.zero_grad(set_to_none=True)
            draws = Draws(run.config.seed, 0, file)
            view = views.open(rows[file], draws)
            engine.step(view, run.classes.index(rows[file].label), draws)
            view.close()
            singles.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
        for found, *single in zip(gradients, *singles, strict=True):
            torch.testing.assert_close(found, torch.stack(single).mean(dim=0), rtol=1e-4, atol=1e-6)


def test_every_epoch_has_its_own_order() -> None:
    orders = [epoch_order(0, epoch, 20).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[1] == epoch_order(0, 1, 20).tolist()
    assert orders[1] != epoch_order(1, 1, 20).tolist()


def test_sequential_trains_one_stage_and_freezes_the_others(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    original = Trainer._step

    def spy(self: Trainer, group: Any) -> None:
        before = {key: value.clone() for key, value in self.network.state_dict().items()}
        original(self, group)
        after = self.network.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        own = (f"stages.{self.state.stage - 1}.", f"heads.{self.state.stage - 1}.", f"decoders.{self.state.stage - 1}.")
        assert moved
        assert all(key.startswith(own) for key in moved)
        seen.append((self.state.stage, before))

    best_of_first: dict[str, torch.Tensor] = {}
    next_stage = Trainer._next_stage

    def before_next(self: Trainer) -> bool:
        if self.state.stage == 1:
            best_of_first.update(self.checkpoints.read("best")[0])
        return next_stage(self)

    monkeypatch.setattr(Trainer, "_step", spy)
    monkeypatch.setattr(Trainer, "_next_stage", before_next)
    run = train(tiny_config(manifest, tmp_path / "run", schedule="sequential"))
    assert [stage for stage, _ in seen] == [1] * 6 + [2] * 6
    first_of_second = seen[6][1]
    for key, value in best_of_first.items():
        assert torch.equal(first_of_second[key], value), "the second stage builds on the best epoch of the first"
    state = run.checkpoints.pointer("best").state
    assert state.stage == 2
    slides = pd.read_csv(run.path / "log" / "slides.csv")
    assert slides["stage2_classification_loss"].isna().tolist() == [True] * 10 + [False] * 10


def test_early_stopping_and_plateau(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wholeslide.train.validation import Score

    monkeypatch.setattr(Score, "better_than", lambda self, best: best is None)
    run = train(tiny_config(manifest, tmp_path / "run", epochs=9, patience=3, lr_patience=2))
    epochs = pd.read_csv(run.path / "log" / "epochs.csv")
    assert len(epochs) == 4
    assert epochs["lr"].tolist() == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4])
    assert epochs["head_lr"].tolist() == pytest.approx([2e-3, 2e-3, 2e-3, 2e-4])
    assert run.checkpoints.pointer("best").state.epoch == 1


def test_a_loss_that_does_not_move_is_said(manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(tiny_config(manifest, tmp_path / "run", epochs=3, lr=1e-12))
    said = [record.getMessage() for record in caplog.records if "does not move" in record.getMessage()]
    assert len(said) == 1
    assert "Try ten times the --lr" in said[0]


@pytest.mark.parametrize("which", ["classification_losses", "reconstruction_losses"])
def test_a_loss_that_is_not_finite_stops(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    original = StreamingEngine.step

    def broken(self: StreamingEngine, *args: Any, **kwargs: Any) -> StepResult:
        result = original(self, *args, **kwargs)
        getattr(result, which)[0] = math.inf
        return result

    monkeypatch.setattr(StreamingEngine, "step", broken)
    with pytest.raises(RunError) as caught:
        train(tiny_config(manifest, tmp_path / "run"))
    first = f"slide{epoch_order(0, 0, 5)[0]}.png"
    assert str(caught.value) == (
        f"the loss is no longer finite ({first}, stage 1, epoch 1): begin anew with a lower --lr, or with --precision fp32"
    )


def test_a_gradient_that_is_not_finite_stops(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = StreamingEngine.step

    def broken(self: StreamingEngine, *args: Any, **kwargs: Any) -> StepResult:
        result = original(self, *args, **kwargs)
        gradient = self.network.head_parameters(2)[0].grad
        assert gradient is not None
        gradient[0] = math.nan
        return result

    monkeypatch.setattr(StreamingEngine, "step", broken)
    with pytest.raises(
        RunError, match=r"a gradient is no longer finite \(slide\d\.png, slide\d\.png, stage 2, epoch 1\)"
    ):
        train(tiny_config(manifest, tmp_path / "run"))


def test_a_slide_that_goes_away_is_named(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ViewSource.open

    def gone(self: ViewSource, entry: Any, *args: Any) -> Any:
        if entry.file == "slide3.png":
            raise OSError(5, "Input/output error")
        return original(self, entry, *args)

    monkeypatch.setattr(ViewSource, "open", gone)
    with pytest.raises(SlideError, match=r"reading failed, .*Input/output error \(slide3\.png\): check the file"):
        train(tiny_config(manifest, tmp_path / "run"))
