"""Encoders trained on patches of slides as whole runs: trained in two parts, resumed, and on new slides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from train_tiny import assert_same_end, make_cohort, tiny_config

from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import write_bag
from wholeslide.baselines.patch_view import PatchView
from wholeslide.baselines.registry import method_info, method_names
from wholeslide.errors import WholeslideError
from wholeslide.predict import evaluate_run, predict
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import dry_run, train
from wholeslide.train.run import Run
from wholeslide.train.trainer import Trainer

OF_PATCHES = [name for name in method_names() if method_info(name).kind == "patches"]

pytestmark = pytest.mark.usefixtures("arithmetic")
methods = pytest.mark.parametrize("method", OF_PATCHES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("slides"), train=4, valid=2, test=2)


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory, arithmetic: None) -> Callable[[str], Run]:
    """A run that is never interrupted: of each part two epochs, of two steps each."""

    @functools.cache
    def trained(method: str) -> Run:
        return train(config(manifest, tmp_path_factory.mktemp("whole") / "run", method))

    return trained


def config(manifest: Path, out: Path, method: str = "mil-rnn", **options: Any) -> TrainConfig:
    return tiny_config(manifest, out, **{"method": method, "patch": 96, **options})


def weights(run: Run, part: str = "") -> dict[str, torch.Tensor]:
    state = run.load_network("last").state_dict()
    return {name: value for name, value in state.items() if name.startswith(part)}


@methods
def test_every_method_trains_evaluates_and_predicts(
    method: str, manifest: Path, tmp_path: Path, whole: Callable[[str], Run]
) -> None:
    run = whole(method)
    found = evaluate_run(run.path)
    assert found["n"] == 2
    assert [part["stage"] for part in found["stages"]] == [1, 2]
    tested = pd.read_csv(run.path / "predictions" / "test.csv")
    rows = predict(run.path, [manifest.parent / name for name in tested["file"]]).rows
    np.testing.assert_allclose(rows[["prob_a", "prob_b"]], tested[["prob_a", "prob_b"]], atol=1e-6)
    epochs = pd.read_csv(run.path / "log" / "epochs.csv")
    assert epochs["stage"].tolist() == [1, 1, 2, 2]
    for part, other in ((1, 2), (2, 1)):
        of_part = epochs[epochs["stage"] == part]
        assert of_part[f"stage{part}_classification_loss"].notna().all()
        assert of_part[f"stage{other}_classification_loss"].isna().all()
    kept = list((run.path / "features").iterdir())
    assert len(kept) == 6, "features are kept of part 2's training and validation slides, made by one encoder"
    assert not (run.path / "plan.json").exists()


@methods
def test_part_1_trains_the_encoder_and_part_2_leaves_it(
    method: str, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    begin = Trainer._begin

    def noted(self: Trainer, state: Any) -> None:
        states[state.stage] = {name: value.clone() for name, value in self.network.state_dict().items()}
        begin(self, state)

    monkeypatch.setattr(Trainer, "_begin", noted)
    ended = weights(train(config(manifest, tmp_path / "run", method, epochs=1, accumulate=1)))
    trained = {
        part: {name for name in ended if not torch.equal(states[part][name], after[name])}
        for part, after in ((1, states[2]), (2, ended))
    }
    learnt = {"encoder.backbone.conv1.weight", "encoder.backbone.layer4.0.bn2.bias", "patch_classifier.weight"}
    assert learnt <= trained[1]
    assert not any(name.startswith("aggregator.") or "running_" in name for name in trained[1])
    assert trained[2]
    assert all(name.startswith("aggregator.") for name in trained[2])


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize(
    ("method", "kills"),
    [("mil-rnn", (1, 3, 2)), ("finetuned-patch+abmil", (2, 3))],
)
def test_a_run_that_was_killed_ends_in_the_same_weights(
    method: str,
    kills: tuple[int, ...],
    manifest: Path,
    tmp_path: Path,
    whole: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the epochs of both parts, and where one is over but not yet validated; after so many steps of each attempt."""
    asked = config(manifest, tmp_path / "killed", method, resume=True, checkpoint_minutes=0)
    step = Trainer._step
    for steps in kills:
        left = iter(range(steps, 0, -1))

        def dying(self: Trainer, group: Any, left: Any = left) -> None:
            step(self, group)
            if next(left) == 1:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", dying)
            with pytest.raises(Killed):
                train(asked)
    train(asked)
    assert_same_end(asked.out, whole(method).path)


def test_reading_ahead_changes_nothing(
    manifest: Path, tmp_path: Path, whole: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatchView, "prefetch", lambda *_: None)
    train(config(manifest, tmp_path / "run"))
    assert_same_end(tmp_path / "run", whole("mil-rnn").path)


def test_the_seed_decides(manifest: Path, tmp_path: Path, whole: Callable[[str], Run]) -> None:
    other, whole_run = train(config(manifest, tmp_path / "run", seed=1)), whole("mil-rnn")
    assert not any(
        torch.equal(value, weights(whole_run)[name]) for name, value in weights(other, "aggregator.").items()
    )


def decided_by_one_patch(folder: Path) -> Path:
    """Images of four patches of noise; in those of class b one of them, somewhere, is greener."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), ["file,patient,label,split"]
    for index, split in enumerate(["train"] * 24 + ["valid"] * 4 + ["test"] * 16):
        pixels = rng.integers(100, 156, size=(64, 64, 3), dtype=np.uint8)
        if index % 2:
            row, column = rng.integers(0, 2, size=2) * 32
            pixels[row : row + 32, column : column + 32, 1] += 60
        Image.fromarray(pixels).save(folder / f"slide{index}.png")
        rows.append(f"slide{index}.png,patient{index},{'ab'[index % 2]},{split}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder / "labels.csv"


@methods
def test_one_patch_that_decides_is_found(method: str, tmp_path: Path) -> None:
    manifest = decided_by_one_patch(tmp_path / "slides")
    options: dict[str, Any] = {
        "patch": 32,
        "epochs": 4,
        "accumulate": 1,
        "lr": 2e-3,
        "optimizer": "adam",
        "monitor": "auroc",
    }
    run = train(config(manifest, tmp_path / "run", method, **options))
    for split in ("train", "test"):
        found = [part["auroc"]["value"] for part in evaluate_run(run.path, split)["stages"]]
        assert min(found) >= 0.95, (split, found)


@methods
def test_files_of_features_are_refused(
    method: str, manifest: Path, tmp_path: Path, whole: Callable[[str], Run]
) -> None:
    for row in pd.read_csv(manifest).to_dict("records"):
        write_bag(Bag(np.ones((5, 8), np.float32)), tmp_path / "features" / f"{Path(row['file']).stem}.h5")
    with pytest.raises(WholeslideError, match="files of features, where the method needs slides") as caught:
        train(config(manifest, tmp_path / "run", method, slides=tmp_path / "features"))
    assert len(caught.value.problems) == 1
    rows = predict(whole(method).path, [tmp_path / "features" / "slide0.h5"]).rows
    assert "a file of features, where the run has an encoder of its own" in rows["error"][0]


@methods
def test_a_dry_run_counts_patches_and_writes_nothing(method: str, manifest: Path, tmp_path: Path) -> None:
    text = "\n".join(dry_run(config(manifest, tmp_path / "run", method)))
    assert "patches of 96 px, in fp32" in text
    assert not (tmp_path / "run").exists()


def test_a_slide_that_is_gone_is_named_in_both_parts(
    manifest: Path, tmp_path: Path, whole: Callable[[str], Run]
) -> None:
    broken = tmp_path / "slide0.png"
    broken.write_bytes((manifest.parent / "slide0.png").read_bytes()[:2000])
    rows = predict(whole("mil-rnn").path, [broken, manifest.parent / "slide1.png"]).rows
    assert "cannot be read" in rows["error"][0]
    assert rows["error"][1] == ""
