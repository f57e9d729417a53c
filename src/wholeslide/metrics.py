"""Predictions → numbers, each with a 95% bootstrap interval over patients.

Definitions, for classes c, n units (files, slides or patients), probabilities p and one-hot truth y:

- ``accuracy``, and the mean recall over classes, ``balanced_accuracy``.
- ``sensitivity``, ``specificity``, ``f1``, ``auroc``: with two classes those of the *positive* class, the last one in
  sorted order; with more, the unweighted mean over classes, each against the rest (macro).
- ``brier``: with two classes mean (p_positive − y)², from 0 to 1; with more mean Σ_c (p_c − y_c)², from 0 to 2
  (scikit-learn's convention).
- ``calibration_error``: expected calibration error of the predicted class over 15 bins of equal width (Guo et al. 2017,
  eq. 3): Σ_bins |Σ (correct − confidence)| / n.
- ``confusion``: counts, rows are the truth, columns the prediction.
- ``loss`` (in `score` alone): mean −log p_truth.

Intervals are percentiles (2.5, 97.5) over resamples of the patients, drawn with replacement among the patients of the
same class, so that each resample has as many patients a class. A patient whose units carry several labels is drawn
among those with the same *set* of labels; where there are such patients, label sets that only one patient has are drawn
from together (one patient alone would show no spread), and resamples for which a metric is undefined are left out of
its interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from wholeslide.errors import CohortError, ConfigError, Problem

Unit = Literal["patient", "slide", "file"]
UNITS: tuple[Unit, ...] = ("patient", "slide", "file")
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "auroc",
    "f1",
    "brier",
    "calibration_error",
)
"""The names in the JSON that have one value."""
LOWER_IS_BETTER = frozenset({"brier", "calibration_error", "loss"})
"""The names that `score` knows and that are to be made small; all others are to be made large."""

_KEYS: dict[str, list[str]] = {
    "file": ["patient", "slide", "file"],
    "slide": ["patient", "slide"],
    "patient": ["patient"],
}
_CALIBRATION_BINS = 15
_PERCENTILES = (2.5, 97.5)
_CHUNK_CELLS = 4_000_000


def aggregate(
    predictions: pd.DataFrame,
    unit: Unit,
    classes: Sequence[str],
    *,
    conflicting_labels: Literal["error", "blank"] = "error",
) -> pd.DataFrame:
    """Average probabilities file → slide → patient, up to ``unit``.

    ``predictions`` has columns ``file, slide, patient, label`` and a ``prob_<class>`` for each class. The result has a
    row for each unit, in the order of their first rows: the names from the unit upwards, ``label`` ("" where
    unlabelled), ``prediction`` and the probabilities. Rows without probabilities (slides that could not be read) are
    left out.

    Raises:
        CohortError: a missing column; a unit whose files carry several labels, unless ``conflicting_labels`` is
            ``blank``.
        ConfigError: no such unit.
    """
    unit = _known(unit)
    columns = [f"prob_{name}" for name in classes]
    table = _readable(predictions, columns)
    keys = _KEYS[unit]
    labels = table[table["label"] != ""].groupby(keys, sort=False)["label"].agg(lambda names: sorted(set(names)))
    conflicts = labels[labels.map(len) > 1]
    if conflicting_labels == "error" and len(conflicts):
        names = conflicts.index if unit == "patient" else conflicts.index.get_level_values(unit)
        raise CohortError(
            Problem(f"files labelled {' and '.join(found)}", f"{unit} {name}", "score each file by itself: --unit file")
            for name, found in zip(names, conflicts, strict=True)
        )
    upwards = list(_KEYS)
    for level in upwards[: upwards.index(unit) + 1]:
        table = table.groupby(_KEYS[level], sort=False, as_index=False)[columns].mean()
    result = table[keys[::-1]].copy()
    label_of = labels.map(lambda found: found[0] if len(found) == 1 else "")
    index = pd.MultiIndex.from_frame(table[keys]) if len(keys) > 1 else pd.Index(table[keys[0]])
    result["label"] = label_of.reindex(index).fillna("").to_numpy(dtype=object)
    result["prediction"] = np.asarray(classes, dtype=object)[table[columns].to_numpy().argmax(axis=1)]
    return pd.concat([result, table[columns]], axis=1)


def evaluate(
    predictions: pd.DataFrame, *, classes: Sequence[str], unit: str = "patient", resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All metrics of the module's docstring, as DESIGN's ``metrics/*.json`` has them.

    ``{"unit", "n", "patients", "unlabelled", "unpredicted", "classes", "positive", "resamples", METRIC: {"value",
    "low", "high"}, …, "confusion": {"classes", "value", "low", "high"}}``. ``positive`` is None for more than two
    classes. ``unlabelled`` counts units without a label and ``unpredicted`` files without probabilities; neither enters
    a metric. A metric that is undefined has value, low and high None and a ``reason``. ``note`` warns where too few
    patients make the intervals too narrow.

    Raises:
        CohortError: a unit with several labels, a label that is no class, a missing column.
        ConfigError: no such unit.
    """
    units = aggregate(predictions, _known(unit), classes)
    labelled = units[units["label"] != ""].reset_index(drop=True)
    _check_labels(labelled, classes)
    scored = Scored.of(labelled, classes)
    point = scored.metrics(np.ones((1, len(labelled))))
    strata = patient_strata(labelled)
    drawn = {}
    if len(labelled):
        drawn = _resampled(scored, labelled["patient"], strata, resamples=resamples, seed=seed)
    result: dict[str, Any] = {
        "unit": unit,
        "n": len(labelled),
        "patients": int(labelled["patient"].nunique()),
        "unlabelled": len(units) - len(labelled),
        "unpredicted": int(_without_probabilities(predictions, [f"prob_{name}" for name in classes]).sum()),
        "classes": list(classes),
        "positive": classes[-1] if len(classes) == 2 else None,
        "resamples": resamples,
    }
    alone = sum(len(patients) == 1 for patients in strata)
    if alone:
        result["note"] = f"{alone} of {len(strata)} classes have one patient only: the intervals are too narrow"
    if alone == len(strata):
        drawn = {}  # nobody can be resampled: an interval would have no width
        result["note"] = "one patient a class: no interval can be given"
    for name in METRICS:
        result[name] = _with_interval(float(point[name][0]), drawn.get(name), scored.reason(name))
    low, high = percentiles(drawn["confusion"]) if drawn else (None, None)
    confusion = point["confusion"][0].astype(int).tolist()
    result["confusion"] = {"classes": list(classes), "value": confusion, "low": low, "high": high}
    return result


def score(predictions: pd.DataFrame, classes: Sequence[str], unit: str, metric: str) -> float:
    """One metric without its interval, for validation while training; NaN where it is undefined.

    ``metric`` is one of `METRICS` or ``loss``, the cross-entropy of the averaged probabilities. See `LOWER_IS_BETTER`.

    Raises:
        CohortError: as for `evaluate`.
        ConfigError: no such metric or unit.
    """
    if metric not in (*METRICS, "loss"):
        known = ", ".join((*METRICS, "loss"))
        raise ConfigError.single("no such metric", where=metric, remedy=f"use one of {known}")
    units = aggregate(predictions, _known(unit), classes)
    labelled = units[units["label"] != ""].reset_index(drop=True)
    _check_labels(labelled, classes)
    if labelled.empty:
        return math.nan
    scored = Scored.of(labelled, classes)
    if metric == "loss":
        of_truth = scored.probabilities[np.arange(len(labelled)), scored.truth]
        return float(-np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)).mean())
    return float(scored.metrics(np.ones((1, len(labelled))))[metric][0])


def auroc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, P(score of a positive > score of a negative) + ½ P(equal), for many weightings at once.

    Args:
        truth: (n,) bool.
        scores: (n,) float.
        weights: (resamples, n), how often each unit counts; once each if absent.

    Returns:
        (resamples,) float; NaN where a weighting has no positive or no negative.
    """
    counts = np.ones((1, len(truth))) if weights is None else weights
    if len(truth) == 0:
        return np.full(len(counts), math.nan)
    order = np.argsort(scores, kind="stable")
    positives = np.where(truth, counts, 0.0)[:, order]
    negatives = np.where(truth, 0.0, counts)[:, order]
    ordered = scores[order]
    ties = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    positives = np.add.reduceat(positives, ties, axis=1)
    negatives = np.add.reduceat(negatives, ties, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return _ratio((positives * (below + negatives / 2)).sum(axis=1), pairs)


@dataclass(frozen=True)
class Scored:
    """Labelled units, ready for many weightings: truth (n,) and probabilities (n, classes)."""

    truth: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def of(cls, units: pd.DataFrame, classes: Sequence[str]) -> Scored:
        index = {name: number for number, name in enumerate(classes)}
        truth = np.array([index[label] for label in units["label"]], dtype=np.int64)
        probabilities = units[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
        return cls(truth, probabilities, tuple(classes))

    def metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric for each row of ``weights`` (resamples, n).

        Each is (resamples,), the confusion (resamples, classes, classes).
        """
        confusion = self._confusion(weights)
        hits = np.diagonal(confusion, axis1=1, axis2=2)
        true, called = confusion.sum(axis=2), confusion.sum(axis=1)
        total = weights.sum(axis=1)
        recall = _ratio(hits, true)
        rest = total[:, None] - true
        specificity = _ratio(rest - (called - hits), rest)
        f1 = np.where(true > 0, _ratio(2 * hits, true + called), math.nan)
        return {
            "confusion": confusion,
            "accuracy": _ratio(hits.sum(axis=1), total),
            "balanced_accuracy": recall.mean(axis=1),
            "sensitivity": self._of_classes(recall),
            "specificity": self._of_classes(specificity),
            "auroc": self.auroc(weights),
            "f1": self._of_classes(f1),
            "brier": _ratio(weights @ self._squared_errors(), total),
            "calibration_error": self._calibration_error(weights),
        }

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """(resamples,) for each row of ``weights`` (resamples, n): the positive class's of two, the mean of more."""
        areas = np.stack([auroc(self.truth == c, p, weights) for c, p in enumerate(self.probabilities.T)], axis=1)
        return self._of_classes(areas)

    def reason(self, metric: str) -> str | None:
        """Why a metric has no value; None where it has one."""
        if not len(self.truth):
            return "no labelled unit in this split"
        present = set(self.truth.tolist())
        absent = [name for number, name in enumerate(self.classes) if number not in present]
        if metric in ("accuracy", "brier", "calibration_error") or not absent:
            return None
        if len(self.classes) == 2 and metric in ("sensitivity", "f1", "specificity"):
            needed = self.classes[0] if metric == "specificity" else self.classes[-1]
            return f"no {needed} in this split" if needed in absent else None
        return f"no {', no '.join(absent)} in this split"

    def _of_classes(self, values: np.ndarray) -> np.ndarray:
        """(resamples, classes) → (resamples,): the positive class's of two, the mean of more."""
        return values[:, -1] if len(self.classes) == 2 else values.mean(axis=1)

    def _confusion(self, weights: np.ndarray) -> np.ndarray:
        count = len(self.classes)
        cell = self.truth * count + self.probabilities.argmax(axis=1)
        counts: np.ndarray = weights @ np.eye(count * count)[cell]
        return counts.reshape(-1, count, count)

    def _squared_errors(self) -> np.ndarray:
        squares: np.ndarray = (self.probabilities - np.eye(len(self.classes))[self.truth]) ** 2
        return squares[:, -1] if len(self.classes) == 2 else squares.sum(axis=1)

    def _calibration_error(self, weights: np.ndarray) -> np.ndarray:
        confidence = self.probabilities.max(axis=1)
        correct = self.probabilities.argmax(axis=1) == self.truth
        bins = np.clip(np.ceil(confidence * _CALIBRATION_BINS).astype(int) - 1, 0, _CALIBRATION_BINS - 1)
        gaps = weights @ (np.eye(_CALIBRATION_BINS)[bins] * (correct - confidence)[:, None])
        return _ratio(np.abs(gaps).sum(axis=1), weights.sum(axis=1))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN instead of a division by zero."""
    undefined = np.full(np.broadcast(above, below).shape, math.nan)
    return np.asarray(np.divide(above, below, out=undefined, where=below > 0))


def patient_strata(labelled: pd.DataFrame) -> list[np.ndarray]:
    """Patients (numbers in the order of their sorted names) that may stand for each other."""
    sets = [tuple(sorted(set(labels))) for _, labels in labelled.groupby("patient", sort=True)["label"]]
    strata = [np.flatnonzero([found == wanted for found in sets]) for wanted in sorted(set(sets))]
    if any(len(found) > 1 for found in sets):
        alone = [stratum for stratum in strata if len(stratum) == 1]
        together = [np.concatenate(alone)] if alone else []
        strata = [stratum for stratum in strata if len(stratum) > 1] + together
    return strata


def _resampled(
    scored: Scored, patients: pd.Series, strata: list[np.ndarray], *, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Every metric for each resample of the patients, (resamples,) and (resamples, classes, classes)."""
    patient_of_unit = np.unique(patients.to_numpy(dtype=str), return_inverse=True)[1]
    chunks = [
        scored.metrics(times[:, patient_of_unit])
        for times in patient_counts(strata, resamples, np.random.default_rng(seed), units=len(patients))
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def patient_counts(
    strata: list[np.ndarray], resamples: int, rng: np.random.Generator, *, units: int, rescaled: bool = False
) -> Iterator[np.ndarray]:
    """How often each patient counts, (some resamples, patients) at a time, so that memory stays bounded.

    A stratum of k is drawn from k times; with ``rescaled`` k − 1 times, and each draw counts k / (k − 1): of k draws the
    resamples of a mean spread too little, their variance is (k − 1) / k of what it should be, a half for two patients (Rao, Wu
    & Yue: Some recent work on resampling methods for complex surveys. Survey Methodology 18, 1992). One patient alone counts
    once either way.
    """
    at_once = max(1, _CHUNK_CELLS // max(1, units))
    for start in range(0, resamples, at_once):
        times = np.zeros((min(at_once, resamples - start), sum(map(len, strata))))
        for members in strata:
            size = len(members)
            draws = max(1, size - 1) if rescaled else size
            times[:, members] = rng.multinomial(draws, np.full(size, 1 / size), size=len(times)) * (size / draws)
        yield times


def _with_interval(value: float, drawn: np.ndarray | None, reason: str | None) -> dict[str, Any]:
    if math.isnan(value):
        return {"value": None, "low": None, "high": None, "reason": reason}
    low, high = (None, None) if drawn is None else percentiles(drawn)
    return {"value": value, "low": low, "high": high}


def percentiles(drawn: np.ndarray) -> tuple[Any, Any]:
    """The 2.5th and 97.5th percentile of the resamples (the first axis) for which there is a value."""
    defined = drawn[~np.isnan(drawn)] if drawn.ndim == 1 else drawn
    if not len(defined):
        return None, None
    low, high = np.percentile(defined, _PERCENTILES, axis=0)
    return low.tolist(), high.tolist()


def _readable(predictions: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows with probabilities, names and labels as text."""
    names = ["file", "slide", "patient", "label"]
    missing = [name for name in (*names, *columns) if name not in predictions]
    if missing:
        listed = ", ".join(missing)
        raise CohortError(
            [Problem(f"no columns {listed}", "predictions", "give a table that predict or evaluate wrote")]
        )
    table = predictions.loc[~_without_probabilities(predictions, columns), [*names, *columns]]
    return table.assign(**{name: table[name].map(_text) for name in names}).reset_index(drop=True)


def _without_probabilities(predictions: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    return predictions[list(columns)].isna().any(axis=1)


def _text(cell: object) -> str:
    """A cell as the manifest had it, after a CSV reader may have taken whole numbers for numbers."""
    if isinstance(cell, float):
        return "" if math.isnan(cell) else str(int(cell)) if cell.is_integer() else str(cell)
    return "" if cell is None else str(cell)


def _known(unit: str) -> Unit:
    for known in UNITS:
        if unit == known:
            return known
    raise ConfigError.single("no such unit", where=f"--unit {unit}", remedy=f"use one of {', '.join(UNITS)}")


def _check_labels(labelled: pd.DataFrame, classes: Sequence[str]) -> None:
    """The labels that no class of the model answers to, all together."""
    unknown = labelled[~labelled["label"].isin(list(classes))]
    if len(unknown):
        known = ", ".join(classes)
        raise CohortError(
            Problem(f"unknown label {label!r}", str(name), f"use one of {known}")
            for name, label in zip(unknown.iloc[:, 0], unknown["label"], strict=True)
        )
