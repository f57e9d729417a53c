"""What a training run does and leaves, on a network of a few thousand weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from train_tiny import make_cohort, same_arithmetic, tiny_config

from wholeslide.draws import Draws
from wholeslide.errors import CohortError, ConfigError, RunError, SlideError, WholeslideError
from wholeslide.slides.prepare import prepare
from wholeslide.slides.working import WorkingSlide, open_working_slide
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.step import StepResult
from wholeslide.train.inference import predict_slides
from wholeslide.train.loop import dry_run, train
from wholeslide.train.run import Run
from wholeslide.train.trainer import Trainer, epoch_order
from wholeslide.train.views import ViewSource, entries


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module", autouse=True)
def arithmetic() -> Iterator[None]:
    with same_arithmetic():
        yield


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
        engine = StreamingEngine(run.load_network(which), run.plan, torch.device("cpu"))
        final, by_stage = predict_slides(engine, run.cohort().split("valid"), run.slide_config, classes=run.classes)
        assert list(final.columns) == ["file", "slide", "patient", "label", "prediction", "prob_a", "prob_b"]
        assert by_stage["stage"].tolist() == [1, 2, 1, 2]
        chosen = [row[f"prob_{row['label']}"] for row in final.to_dict("records")]
        assert -np.log(chosen).mean() == pytest.approx(epochs["valid_stage2_loss"][epoch - 1], rel=1e-6)


def test_a_file_that_cannot_be_read_is_passed_on_or_raised(run: Run, tmp_path: Path) -> None:
    table = run.cohort().split("valid").copy()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    table.iloc[0, table.columns.get_loc("path")] = str(bad)
    engine = StreamingEngine(run.load_network(), run.plan, torch.device("cpu"))
    met = []
    final, _ = predict_slides(
        engine, table, run.slide_config, classes=run.classes, on_error=lambda entry, error: met.append((entry, error))
    )
    assert final["file"].tolist() == [table["file"].iloc[1]]
    assert met[0][0].file == table["file"].iloc[0]
    with pytest.raises(SlideError, match=r"bad\.png"):
        predict_slides(engine, table, run.slide_config, classes=run.classes)


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
    views = ViewSource(run.slide_config, network.padded_size, None, run.config.augmentation_config(), run.mean_grey)
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


def test_dry_run_says_what_would_happen_and_writes_nothing(manifest: Path, tmp_path: Path) -> None:
    config = tiny_config(manifest, tmp_path / "run")
    lines = dry_run(config)
    text = "\n".join(lines)
    assert lines[0] == "9 files of 9 slides of 9 patients"
    assert "  train: 5 files (a 3, b 2)" in lines
    for part in ("working sizes", "s a slide", "an epoch", "for 2 epochs", "memory: about", "disk: about"):
        assert part in text
    assert not (tmp_path / "run").exists()
    train(config)
    lines = dry_run(tiny_config(manifest, tmp_path / "run", resume=True, epochs=4))
    assert lines[0] == f"would go on with {tmp_path / 'run'} after 2 epochs and 6 steps"


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
    config = tiny_config(manifest, tmp_path / "run", cache=cache, class_weights="balanced")
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
        fractions=(0.5, 0.5, 0.5),
        loggers=("csv", "wandb"),
    )
    with pytest.raises(WholeslideError) as caught:
        train(config)
    text = str(caught.value)
    for part in (
        "unknown method 'clam' (--method): choose local, local-kN with N stages (local-k4), or end-to-end",
        "training on 2 is not supported (--devices): leave --devices at 1",
        "-1.0 is no learning rate (--lr)",
        f"a file is in the way ({manifest}): give another --out",
        "no such folder",
        "resnet_unheard_of",
        "not a size of memory (--memory 8 elephants)",
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
