"""What the folder of a run says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wholeslide.errors import RunError
from wholeslide.train.run import Run


@dataclass(frozen=True)
class Scores:
    """A split that the run was scored on.

    Attributes:
        metrics: as `wholeslide.metrics.evaluate` has them, and those of each stage.
        predictions: a row a file.
    """

    split: str
    metrics: dict[str, Any]
    predictions: pd.DataFrame

    @property
    def by_loss(self) -> pd.DataFrame:
        """The files with their ``loss``, the cross-entropy in nats, the largest first; then those without label or answer."""
        table = self.predictions
        columns = {name: f"prob_{name}" for name in self.metrics["classes"]}
        of_label = np.full(len(table), np.nan)
        for name, column in columns.items():
            of_label = np.where(table["label"] == name, table[column].astype(float), of_label)
        loss = -np.log(np.maximum(of_label, np.finfo(np.float64).tiny))
        confidence = table[list(columns.values())].astype(float).max(axis=1)
        return table.assign(loss=loss, confidence=confidence).sort_values(
            "loss", ascending=False, kind="stable", na_position="last", ignore_index=True
        )


@dataclass(frozen=True)
class RunFacts:
    """A run as it is on disk; ``epochs`` is empty before the first, ``scores`` missing where it was not scored yet."""

    run: Run
    cohort: pd.DataFrame
    epochs: pd.DataFrame
    slides: pd.DataFrame
    excluded: pd.DataFrame
    scores: Scores | None

    @classmethod
    def read(cls, run_dir: Path, split: str) -> RunFacts:
        """Of a run and one of the splits, or of the other cohorts, that it was scored on.

        Raises:
            RunError: no such run, or its files are damaged.
        """
        run = Run.open(run_dir)
        cohort = _table(run_dir / "cohort.csv")
        epochs, slides = (_numbers(run_dir / "log" / name) for name in ("epochs.csv", "slides.csv"))
        return cls(run, cohort, epochs, slides, _table(run_dir / "excluded.csv"), _scores(run_dir, split))

    @property
    def stages(self) -> int:
        """How many classifiers were trained."""
        found = [name for name in self.epochs.columns if name.endswith("_classification_loss")]
        return max(1, len(found))

    def split_counts(self) -> pd.DataFrame:
        """Files and patients of each label in each split: columns ``split, label, files, patients``."""
        grouped = self.cohort.groupby(["split", "label"], sort=False)
        counted = grouped.agg(files=("file", "size"), patients=("patient", "nunique")).reset_index()
        order = {name: place for place, name in enumerate(("train", "valid", "test"))}
        place = counted["split"].map(lambda name: order.get(name, len(order)))
        return counted.assign(place=place).sort_values(["place", "label"], kind="stable").drop(columns="place")


def _scores(run_dir: Path, split: str) -> Scores | None:
    metrics, predictions = run_dir / "metrics" / f"{split}.json", run_dir / "predictions" / f"{split}.csv"
    if not metrics.is_file():
        return None
    try:
        found = json.loads(metrics.read_text(encoding="utf-8"))
        table = _table(predictions)
        for name in found["classes"]:
            table[f"prob_{name}"] = pd.to_numeric(table[f"prob_{name}"])
        return Scores(split, found, table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(metrics, "score the run again with `wholeslide evaluate`") from error


def _table(path: Path) -> pd.DataFrame:
    """A table of text; empty where there is none."""
    if not path.is_file():
        return pd.DataFrame()
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, "put back a copy of it") from error


def _numbers(path: Path) -> pd.DataFrame:
    """A log; empty where there is none."""
    if not path.is_file():
        return pd.DataFrame()
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, "put back a copy of it") from error


def _damaged(path: Path, remedy: str) -> RunError:
    return RunError.single(f"{path.name} is damaged", where=str(path), remedy=remedy)
