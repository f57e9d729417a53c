"""Comparisons with networks that are trained: in this process, and by the command in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from train_tiny import make_cohort, same_arithmetic, tiny_config

from wholeslide.baselines.bag import Bag
from wholeslide.baselines.feature_files import write_bag
from wholeslide.cli import load
from wholeslide.cli.compare import typed
from wholeslide.cli.parser import parse
from wholeslide.compare.cell_run import run_cell
from wholeslide.compare.cells import Case
from wholeslide.compare.config import CompareConfig
from wholeslide.compare.harness import compare
from wholeslide.compare.launch import Ending
from wholeslide.metrics import score

METHODS = ("average", "abmil", "local-k2", "end-to-end", "frozen-whole")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of six patients, without a split."""
    manifest = make_cohort(tmp_path_factory.mktemp("images"), train=6, valid=0, test=0)
    pd.read_csv(manifest).drop(columns="split").to_csv(manifest, index=False)
    return manifest


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve files of features whose classes differ in the first of four."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    rows = ["file,patient,label"]
    for number in range(12):
        values = rng.normal(size=(5, 4)).astype(np.float32)
        values[:, 0] += 4 * (number % 2)
        write_bag(Bag(values), folder / f"s{number}.h5")
        rows.append(f"s{number}.h5,p{number},{'ab'[number % 2]}")
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def in_this_process(case: Case) -> Ending:
    with same_arithmetic():
        assert run_cell(case).state == "finished"
    return "done"


def asked(images: Path, out: Path, **options: Any) -> CompareConfig:
    train = tiny_config(images, out, patch=96, epochs=1, group="patient")
    values: dict[str, Any] = {"methods": METHODS, "folds": 3, "resamples": 100, **options}
    return CompareConfig(train=train, **values)


def test_methods_of_every_kind_are_compared_on_the_same_folds_and_twice_alike(images: Path, tmp_path: Path) -> None:
    tables = []
    for name in ("one", "two"):
        found = compare(asked(images, tmp_path / name), worker=in_this_process)
        assert not found.failed
        tables.append(pd.read_csv(tmp_path / name / "predictions.csv"))
    pd.testing.assert_frame_equal(*tables)
    by_file = tables[0].groupby("file")
    assert (by_file["method"].apply(sorted).map(tuple) == tuple(sorted(METHODS))).all()
    folds = pd.read_csv(tmp_path / "one" / "folds.csv").set_index("file")["fold"]
    assert (tables[0]["fold"] == tables[0]["file"].map(folds)).all()
    for method in ("local-k2", "abmil"):
        rows = tables[0][tables[0]["method"] == method]
        each = [score(rows[rows["fold"] == fold], ("a", "b"), "patient", "auroc") for fold in range(3)]
        table = pd.read_csv(tmp_path / "one" / "table.csv").set_index("method")
        assert table.loc[method, "auroc"] == pytest.approx(np.mean(each))
    trained = table["trained_parameters"]
    assert trained["frozen-whole"] < trained["end-to-end"] < trained["local-k2"]
    assert trained["average"] == 32 * 2 + 2


def command(features: Path, out: Path, *more: str) -> list[str]:
    words = ["compare", str(features), "--slides", str(features.parent), "--out", str(out), "--quiet", "--folds", "3"]
    words += ["--methods", "average", "--monitor", "loss", "--loggers", "csv", "--resamples", "200", *more]
    return [sys.executable, "-m", "wholeslide", *words]


def test_the_command_survives_a_signal_and_ends_as_if_none_had_come(features: Path, tmp_path: Path) -> None:
    words = command(features, tmp_path / "s", "--epochs", "60", "--lr", "0.01")
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        log = tmp_path / "s" / "cells" / "average" / "fold-1" / "seed-0" / "log" / "epochs.csv"
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert [path.parent.name for path in (tmp_path / "s").glob("cells/average/*/seed-0.csv")] == ["fold-0"]
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "average, fold 0" not in again.stderr  # what is done is not begun again
    assert "average (reference)" in again.stdout
    arguments = parse(load("compare"), command(features, tmp_path / "w", "--epochs", "60", "--lr", "0.01")[4:])
    compare(typed(arguments.compare), worker=in_this_process)
    for name in ("predictions.csv", "folds.csv"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "w" / name).read_bytes()
    assert pd.read_csv(tmp_path / "s" / "table.csv").set_index("method").loc["average", "auroc"] == 1.0
    assert (tmp_path / "s" / "comparison.png").stat().st_size > 10_000
    _check_measured(json.loads((tmp_path / "s" / "cells/average/fold-2/seed-0.json").read_text()))


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not come to this"
        time.sleep(0.02)


def _check_measured(record: dict[str, Any]) -> None:
    """What a cell took."""
    assert record["state"] == "finished"
    assert record["cpu_seconds"] > 0
    assert 0 < record["train_seconds"] < 60
    assert 100e6 < record["peak_bytes"] < 4e9  # torch alone takes more than the former
    assert record["trained_parameters"] == 4 * 2 + 2
