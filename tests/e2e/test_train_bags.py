"""Classifiers of patch features as whole runs: from slides, from files of features, resumed, and on new slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from train_tiny import make_cohort, tiny_config

from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import write_bag
from wholeslide.baselines.registry import method_info, method_names
from wholeslide.errors import WholeslideError
from wholeslide.predict import evaluate_run, predict
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import dry_run, train
from wholeslide.train.run import Run

OF_BAGS = [name for name in method_names() if method_info(name).kind == "bags"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("slides"), train=6, valid=2, test=2)


def config(manifest: Path, out: Path, **options: Any) -> TrainConfig:
    asked = {"method": "abmil", "patch": 96, "precision": "fp32", "epochs": 2, **options}
    return tiny_config(manifest, out, **asked)


@pytest.mark.parametrize("method", OF_BAGS)
def test_every_method_trains_evaluates_and_predicts(method: str, manifest: Path, tmp_path: Path) -> None:
    run = train(config(manifest, tmp_path / "run", method=method, features_cache=manifest.parent / "kept"))
    found = evaluate_run(run.path)
    assert found["n"] == 2
    tested = pd.read_csv(run.path / "predictions" / "test.csv")
    rows = predict(run.path, [manifest.parent / name for name in tested["file"]]).rows
    np.testing.assert_allclose(rows[["prob_a", "prob_b"]], tested[["prob_a", "prob_b"]], atol=1e-6)
    assert not (run.path / "plan.json").exists()


def test_what_is_made_of_other_slides_is_not_kept_and_a_run_may_move(manifest: Path, tmp_path: Path) -> None:
    run = train(config(manifest, tmp_path / "run"))
    kept = {file.name for file in (run.path / "features").iterdir()}
    assert len(kept) == 8  # training and validation
    tested = [manifest.parent / name for name in run.cohort().split("test")["file"]]
    predict(run.path, tested)
    assert {file.name for file in (run.path / "features").iterdir()} == kept
    moved = run.path.rename(tmp_path / "moved")
    evaluate_run(moved)
    assert len(list((moved / "features").iterdir())) == 10
    assert not run.path.exists()


def test_a_cache_that_cannot_be_made_is_named(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WholeslideError, match=r"the folder cannot be made.*--features-cache"):
        train(config(manifest, tmp_path / "run", features_cache=tmp_path / "file" / "kept"))


def test_features_are_made_once_for_all_runs(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(config(manifest, tmp_path / "first", features_cache=tmp_path / "kept"))
    monkeypatch.setattr("wholeslide.baselines.bag_cache.bag_of", lambda *_, **__: pytest.fail("made again"))
    second = train(config(manifest, tmp_path / "second", features_cache=tmp_path / "kept"))
    same = [torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True)]
    assert all(same)


def weights(run: Run) -> list[torch.Tensor]:
    return list(run.load_network("last").state_dict().values())


@pytest.mark.parametrize("method", ["clam-sb", "transmil"])  # with dropout; with slow weights
def test_a_resumed_run_ends_in_the_same_weights(method: str, manifest: Path, tmp_path: Path) -> None:
    whole = train(config(manifest, tmp_path / "whole", method=method, epochs=3))
    train(config(manifest, tmp_path / "cut", method=method, epochs=1))
    cut = train(config(manifest, tmp_path / "cut", method=method, epochs=3, precision="auto", resume=True))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(cut), strict=True))


@pytest.fixture
def features(manifest: Path, tmp_path: Path) -> Path:
    """Of the cohort's slides, as another program might have made them: eight numbers, the first of which tells the class."""
    folder, rng = tmp_path / "features", np.random.default_rng(0)
    for row in pd.read_csv(manifest).to_dict("records"):
        bag_nd = rng.normal(size=(5, 8)).astype(np.float32)
        bag_nd[:, 0] += 4 * (row["label"] == "b")
        write_bag(Bag(bag_nd), folder / f"{Path(row['file']).stem}.h5")
    return folder


def test_files_of_features_stand_for_slides(manifest: Path, features: Path, tmp_path: Path) -> None:
    run = train(config(manifest, tmp_path / "run", slides=features, epochs=20, lr=1e-2))
    assert run.tissue is None
    assert run.feature_width == 8
    assert evaluate_run(run.path)["auroc"]["value"] == 1.0
    rows = predict(run.path, [features]).rows
    assert len(rows) == 10
    truth = pd.read_csv(manifest).assign(slide=lambda table: table["file"].str.removesuffix(".png"))
    assert rows.merge(truth[["slide", "label"]], on="slide").eval("prediction == label").all()


def test_what_is_wrong_with_files_of_features_is_told_together(manifest: Path, features: Path, tmp_path: Path) -> None:
    write_bag(Bag(np.ones((3, 9), np.float32)), features / "slide0.h5")
    (features / "slide1.h5").write_bytes(b"nothing")
    with pytest.raises(WholeslideError, match=r"slide1\.h5"):
        train(config(manifest, tmp_path / "run", slides=features))
    write_bag(Bag(np.ones((3, 8), np.float32)), features / "slide1.h5")
    with pytest.raises(WholeslideError, match=r"9 features a patch, where most have 8 \(slide0\.png\)"):
        train(config(manifest, tmp_path / "run", slides=features))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "local"}, "files of features, where the method needs slides"),
        ({"precision": "fp64"}, "encoders do not compute in fp64"),
        ({"patch": 1}, "1 is too small"),
    ],
)
def test_options_without_sense_are_named(
    manifest: Path, features: Path, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(WholeslideError, match=line):
        train(config(manifest, tmp_path / "run", slides=features, **options))


def test_a_dry_run_counts_patches_and_slides_need_slides(manifest: Path, features: Path, tmp_path: Path) -> None:
    text = "\n".join(dry_run(config(manifest, tmp_path / "run", memory="1GiB")))
    assert "--memory 1GiB plans stages, and bounds nothing with --method abmil" in text
    assert "patches of 96 px, in fp32" in text
    text = "\n".join(dry_run(config(manifest, tmp_path / "run", slides=features)))
    assert "5 to 5 patches a slide, of 8 features each" in text
    run = train(config(manifest, tmp_path / "run"))
    result = predict(run.path, [features / "slide0.h5"])
    assert "a file of features, where the run has an encoder of its own" in result.rows["error"][0]
    with pytest.raises(WholeslideError, match="computes as it was trained"):
        predict(run.path, [manifest.parent / "slide0.png"], precision="bf16")
    with pytest.raises(WholeslideError, match="no stages to compile"):
        predict(run.path, [manifest.parent / "slide0.png"], compiled=True)
