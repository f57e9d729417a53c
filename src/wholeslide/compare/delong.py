"""DeLong's test of two correlated areas under the ROC curve.

DeLong, DeLong & Clarke-Pearson: Comparing the areas under two or more correlated receiver operating characteristic curves.
Biometrics 44, 1988. The structural components are found from midranks in O(n log n): Sun & Xu, Fast implementation of
DeLong's algorithm. IEEE Signal Processing Letters 21, 2014, eqs. 5 to 8.

Folds are tested by different networks, so their scores are never ranked together: each fold gives a difference with its
variance, and as folds share no patient, the variance of the mean difference is the sum of theirs over the square of their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True)
class DeLong:
    """The mean over folds of one method's area less another's, its standard error, and the two-sided p value."""

    difference: float
    error: float
    p: float


def delong(
    truth: np.ndarray, scores: np.ndarray, other_scores: np.ndarray, folds: Sequence[np.ndarray]
) -> DeLong | None:
    """Test that two methods have the same area, averaged over folds.

    Args:
        truth: (n,) bool, one unit a patient.
        scores: (n,) of the one method.
        other_scores: (n,) of the other.
        folds: the positions of each fold's units.

    Returns:
        Nothing where a fold has fewer than two units of a class, so that there is no variance, or where it is zero though the areas
        differ.
    """
    differences, variances = [], []
    for rows in folds:
        positive = truth[rows]
        if positive.sum() < 2 or (~positive).sum() < 2:
            return None
        areas, covariance = areas_with_covariance(positive, np.stack([scores[rows], other_scores[rows]]))
        differences.append(areas[0] - areas[1])
        variances.append(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference = float(np.mean(differences))
    error = math.sqrt(max(0.0, float(np.sum(variances)))) / len(folds)
    if error < 1e-12:
        return DeLong(difference, 0.0, 1.0) if abs(difference) < 1e-12 else None
    return DeLong(difference, error, math.erfc(abs(difference) / error / math.sqrt(2)))


def areas_with_covariance(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The areas of several methods, (k,), and the covariance of their estimates, (k, k).

    Args:
        truth: (n,) bool, with at least two of each.
        scores: (k, n).
    """
    positives, negatives = scores[:, truth], scores[:, ~truth]
    m, n = positives.shape[1], negatives.shape[1]
    together = rankdata(np.concatenate([positives, negatives], axis=1), axis=1)
    of_positives = (together[:, :m] - rankdata(positives, axis=1)) / n
    of_negatives = 1 - (together[:, m:] - rankdata(negatives, axis=1)) / m
    covariance = np.atleast_2d(np.cov(of_positives)) / m + np.atleast_2d(np.cov(of_negatives)) / n
    return of_positives.mean(axis=1), covariance
