"""Curves by hand, and bands that hold what they should."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from wholeslide.report.bands import precision_recall, roc


def units(truth: list[int], scores: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": [f"p{number:03d}" for number in range(len(truth))],
            "label": ["b" if one else "a" for one in truth],
            "prob_a": [1 - score for score in scores],
            "prob_b": scores,
        }
    )


def test_by_hand() -> None:
    table = units([0, 1, 0, 1], [0.1, 0.4, 0.6, 0.9])
    curve = roc(table, "b", resamples=20)
    assert curve is not None
    assert set(zip(curve.x.tolist(), curve.y.tolist(), strict=True)) == {(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)}
    curve = precision_recall(table, "b", resamples=20)
    assert curve is not None
    best = {recall: max(curve.y[curve.x == recall]) for recall in (0.5, 1.0)}
    assert best == {0.5: 1.0, 1.0: pytest.approx(2 / 3)}


def test_the_band_holds_the_curve_and_narrows_with_patients() -> None:
    widths = []
    for count in (40, 400):
        rng = np.random.default_rng(1)
        truth = np.arange(count) % 2
        scores = 1 / (1 + np.exp(-(rng.normal(size=count) + 1.5 * truth)))
        table = units(truth.tolist(), scores.tolist())
        curve = roc(table, "b", resamples=300)
        assert curve is not None
        assert curve.low is not None
        assert curve.high is not None
        middle = np.interp(curve.grid, curve.x, curve.y)
        inside = (curve.low - 1e-9 <= middle) & (middle <= curve.high + 0.08)
        assert inside.mean() > 0.9
        assert np.trapezoid(curve.low, curve.grid) < roc_auc_score(truth, scores) < np.trapezoid(curve.high, curve.grid)
        widths.append(float((curve.high - curve.low).mean()))
    assert widths[1] < widths[0] / 2


def test_patients_are_drawn_and_not_their_units() -> None:
    """Ten units of each patient are no more than one: the band is as wide."""
    rng = np.random.default_rng(2)
    truth = [0, 1] * 10
    scores = (rng.random(20) * 0.6 + 0.4 * np.array(truth)).tolist()
    once = units(truth, scores)
    often = pd.concat([once] * 10, ignore_index=True)
    widths = []
    for table in (once, often):
        curve = roc(table, "b", resamples=200)
        assert curve is not None
        assert curve.low is not None
        assert curve.high is not None
        widths.append(curve.high - curve.low)
    assert np.allclose(*widths)


def test_what_has_no_curve_and_no_band() -> None:
    assert roc(units([1, 1], [0.2, 0.8]), "b", resamples=10) is None
    assert precision_recall(units([0, 0], [0.2, 0.8]), "b", resamples=10) is None
    alone = roc(units([0, 1], [0.2, 0.8]), "b", resamples=10)
    assert alone is not None
    assert alone.low is None
