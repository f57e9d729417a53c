"""The difference between two methods that were scored on the same resamples of the same patients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wholeslide.compare.resampling import Resampled
from wholeslide.metrics import percentiles

_TIE = 1e-12
"""Areas are quotients of counts: what is nearer is equal, but for rounding in the mean over folds."""


@dataclass(frozen=True)
class Difference:
    """One method's value less another's, its 95% percentile interval, and the two-sided p value of the null of none.

    ``undefined`` counts the resamples on which either has no value; they are left out.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    undefined: int


def paired_difference(method: Resampled, reference: Resampled, metric: str = "auroc") -> Difference:
    """Compare two methods of one `bootstrap`.

    p is twice the smaller of the two parts of the resamples on which the difference is at most, and at least, zero: the level at
    which the percentile interval just holds zero (Efron & Tibshirani: An Introduction to the Bootstrap, 1993, chapter 15). One is
    added to count and number, so that it is never zero (Davison & Hinkley: Bootstrap Methods and their Application, 1997,
    chapter 4). Methods that are equal on a resample count on both sides.
    """
    differences = _less(method.drawn[metric], reference.drawn[metric])
    defined = differences[~np.isnan(differences)]
    low, high = percentiles(defined)
    value = float(_less(np.array(method.value[metric]), np.array(reference.value[metric])))
    return Difference(value, low, high, two_sided(defined), len(differences) - len(defined))


def _less(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The difference, zero where there is none but by rounding."""
    difference = one - other
    return np.where(np.abs(difference) < _TIE, 0.0, difference)


def two_sided(differences: np.ndarray) -> float | None:
    """The p value of resampled differences; nothing where there are none."""
    if not len(differences):
        return None
    smaller = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (smaller + 1) / (len(differences) + 1))
