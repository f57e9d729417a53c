"""ROC and precision-recall curves with bands, by resampling patients as the intervals of the metrics do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from wholeslide.metrics import patient_counts, patient_strata, percentiles

Values = npt.NDArray[np.float64]

_GRID = np.linspace(0, 1, 101)
_SEED = 0


@dataclass(frozen=True, eq=False)
class Curve:
    """``y`` over ``x``, both (n,), and where 95% of the resampled curves lie, over ``grid``; no band with one patient a class."""

    x: Values
    y: Values
    grid: Values
    low: Values | None
    high: Values | None


def roc(units: pd.DataFrame, name: str, *, resamples: int) -> Curve | None:
    """Sensitivity over 1 - specificity of one class against the rest; ``None`` where one of the two is missing.

    Args:
        units: labelled units, with columns ``patient, label, prob_<class>``.
        name: the class.
        resamples: how many.
    """

    def points(truth: npt.NDArray[np.bool_], scores: Values, weights: Values | None) -> tuple[Values, Values]:
        false, true, _ = roc_curve(truth, scores, sample_weight=weights, drop_intermediate=False)
        return false, true

    def at_grid(false: Values, true: Values) -> Values:
        # of several points above one another, the highest
        return np.interp(_GRID, *_highest(false, true))

    return _curve(units, name, resamples, points, at_grid)


def precision_recall(units: pd.DataFrame, name: str, *, resamples: int) -> Curve | None:
    """Precision over recall of one class against the rest, the best precision at that recall or a higher one.

    Args:
        units: as for `roc`.
        name: the class.
        resamples: how many.
    """

    def points(truth: npt.NDArray[np.bool_], scores: Values, weights: Values | None) -> tuple[Values, Values]:
        precision, recall, _ = precision_recall_curve(truth, scores, sample_weight=weights)
        order = np.argsort(recall, kind="stable")
        reached = np.maximum.accumulate(precision[order][::-1])[::-1]
        return recall[order], reached

    def at_grid(recall: Values, precision: Values) -> Values:
        return precision[np.minimum(np.searchsorted(recall, _GRID - 1e-12), len(recall) - 1)]

    return _curve(units, name, resamples, points, at_grid)


def _curve(units: pd.DataFrame, name: str, resamples: int, points, at_grid) -> Curve | None:  # type: ignore[no-untyped-def]
    truth = units["label"].to_numpy() == name
    if truth.all() or not truth.any():
        return None
    scores = units[f"prob_{name}"].to_numpy(dtype=np.float64)
    x, y = points(truth, scores, None)
    strata = patient_strata(units)
    if all(len(patients) == 1 for patients in strata):
        return Curve(x, y, _GRID, None, None)
    patient_of_unit = np.unique(units["patient"].to_numpy(dtype=str), return_inverse=True)[1]
    drawn = []
    for times in patient_counts(strata, resamples, np.random.default_rng(_SEED), units=len(units)):
        for weights in times[:, patient_of_unit]:
            counted = weights > 0
            if truth[counted].any() and not truth[counted].all():
                drawn.append(at_grid(*points(truth[counted], scores[counted], weights[counted])))
    low, high = percentiles(np.stack(drawn))
    return Curve(x, y, _GRID, np.asarray(low), np.asarray(high))


def _highest(x: Values, y: Values) -> tuple[Values, Values]:
    last = np.append(x[1:] != x[:-1], True)
    return x[last], y[last]
