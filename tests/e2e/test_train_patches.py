"""Encoders trained on patches of slides as whole runs: trained in two parts, resumed, and on new slides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from train_tiny import make_cohort, tiny_config

from wholeslide.baselines.registry import method_info, method_names
from wholeslide.predict import evaluate_run, predict
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train
from wholeslide.train.run import Run

OF_PATCHES = [name for name in method_names() if method_info(name).kind == "patches"]
methods = pytest.mark.parametrize("method", OF_PATCHES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("slides"), train=4, valid=2, test=2)


def config(manifest: Path, out: Path, method: str = "mil-rnn", **options: Any) -> TrainConfig:
    return tiny_config(manifest, out, **{"method": method, "patch": 96, "stages": 4, **options})


def weights(run: Run, part: str = "") -> dict[str, torch.Tensor]:
    state = run.load_network("last").state_dict()
    return {name: value for name, value in state.items() if name.startswith(part)}


@methods
def test_every_method_trains_evaluates_and_predicts(method: str, manifest: Path, tmp_path: Path) -> None:
    run = train(config(manifest, tmp_path / "run", method))
    found = evaluate_run(run.path)
    assert found["n"] == 2
    assert [part["stage"] for part in found["stages"]] == [1, 2]
    tested = pd.read_csv(run.path / "predictions" / "test.csv")
    rows = predict(run.path, [manifest.parent / name for name in tested["file"]]).rows
    np.testing.assert_allclose(rows[["prob_a", "prob_b"]], tested[["prob_a", "prob_b"]], atol=1e-6)
    epochs = pd.read_csv(run.path / "log" / "epochs.csv")
    assert epochs["stage"].tolist() == [1, 1, 2, 2]
    assert not (run.path / "plan.json").exists()
