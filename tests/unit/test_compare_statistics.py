"""The statistics of a comparison against slow and independent ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest, norm
from sklearn.metrics import roc_auc_score

from wholeslide.compare.delong import areas_with_covariance, delong
from wholeslide.compare.holm import holm
from wholeslide.compare.paired import paired_difference, two_sided
from wholeslide.compare.resampling import Resampled, bootstrap, fold_strata, rows_of_folds
from wholeslide.metrics import patient_counts

Bootstrap = Callable[..., dict[str, Resampled]]


def cohort(patients: int, *, classes: int = 2, folds: int = 3, files: int = 1) -> pd.DataFrame:
    """Units of patients who each have one label, dealt evenly to the folds."""
    of_unit = np.repeat(np.arange(patients), files)
    return pd.DataFrame(
        {
            "patient": [f"p{number}" for number in of_unit],
            "fold": [str(number // classes % folds) for number in of_unit],
            "label": ["abcd"[number % classes] for number in of_unit],
        }
    )


def probabilities(units: pd.DataFrame, *, signal: float, seed: int, classes: int = 2) -> np.ndarray:
    """Noise, and more of it for the truth."""
    truth = np.array(["abcd".index(label) for label in units["label"]])
    logits = np.random.default_rng(seed).normal(size=(len(units), classes)) + signal * np.eye(classes)[truth]
    powers = np.exp(logits)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def area(truth: np.ndarray, found: np.ndarray) -> float:
    """By scikit-learn: the second class's of two, the mean of more, each against the rest."""
    classes = found.shape[1]
    chosen = [1] if classes == 2 else range(classes)
    return float(np.mean([roc_auc_score(truth == c, found[:, c]) for c in chosen]))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("files", [1, 3])
def test_areas_of_resamples_are_those_of_scikit_learn_on_repeated_rows(classes: int, files: int) -> None:
    units = cohort(24, classes=classes, folds=2, files=files)
    found = probabilities(units, signal=1.0, seed=1, classes=classes).round(2)  # with ties
    drawn = bootstrap(units, {"m": found}, "abc"[:classes], resamples=40, seed=7)["m"]
    truth = np.array(["abcd".index(label) for label in units["label"]])
    patient_of_unit, strata = fold_strata(units)
    (times,) = patient_counts(strata, 40, np.random.default_rng(7), units=len(units), rescaled=True)
    draws = np.rint(times * (1 - 1 / len(strata[0]))).astype(int)  # of strata of one size
    for number, weights in enumerate(draws[:, patient_of_unit]):
        rows = [np.repeat(inside, weights[inside]) for inside in rows_of_folds(units)]
        assert drawn.drawn["auroc"][number] == pytest.approx(np.mean([area(truth[r], found[r]) for r in rows]))
        together = np.concatenate(rows)
        assert drawn.drawn["accuracy"][number] == pytest.approx(
            np.mean(found[together].argmax(axis=1) == truth[together])
        )
    assert drawn.value["auroc"] == pytest.approx(np.mean([area(truth[r], found[r]) for r in rows_of_folds(units)]))


def test_patients_are_drawn_within_fold_and_class_and_with_all_their_files() -> None:
    units = cohort(30, classes=3, folds=2, files=2)
    patient_of_unit, strata = fold_strata(units)
    (times,) = patient_counts(strata, 50, np.random.default_rng(0), units=len(units), rescaled=True)
    weights = times[:, patient_of_unit]
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    for _, rows in units.groupby(["fold", "label"]):
        np.testing.assert_allclose(weights[:, rows.index].sum(axis=1), len(rows))
    assert len(strata) == 6
    assert times.std() > 0.5


def assert_paired(draw: Bootstrap) -> None:
    """Methods that rank alike differ on no resample, and such that nearly do differ by little."""
    units = cohort(60)
    one = probabilities(units, signal=1.0, seed=0)
    alike = one**3 / (one**3).sum(axis=1, keepdims=True)
    near = one.copy()
    near[[0, 1]] = one[[1, 0]]
    found = draw(units, {"one": one, "alike": alike, "near": near}, "ab", resamples=200, seed=0)
    assert not np.abs(found["alike"].drawn["auroc"] - found["one"].drawn["auroc"]).any()
    assert np.std(found["near"].drawn["auroc"] - found["one"].drawn["auroc"]) < 0.4 * np.std(
        found["one"].drawn["auroc"]
    )


def test_methods_are_scored_on_the_same_resamples() -> None:
    assert_paired(bootstrap)


def test_the_check_of_pairing_can_fail() -> None:
    def unpaired(units: pd.DataFrame, methods: dict[str, np.ndarray], classes: str, **how: int) -> dict[str, Resampled]:
        return {
            name: bootstrap(units, {name: found}, classes, resamples=how["resamples"], seed=number)[name]
            for number, (name, found) in enumerate(methods.items())
        }

    with pytest.raises(AssertionError):
        assert_paired(unpaired)


def p_values(*, signals: tuple[float, float], count: int) -> np.ndarray:
    """Of cohorts on which two methods see as much of the truth as ``signals`` say."""
    units = cohort(60)
    found = []
    for number in range(count):
        methods = {
            str(at): probabilities(units, signal=signal, seed=2 * number + at) for at, signal in enumerate(signals)
        }
        drawn = bootstrap(units, methods, "ab", resamples=199, seed=number)
        found.append(paired_difference(drawn["1"], drawn["0"]).p)
    return np.array(found, dtype=float)


def test_p_values_are_even_where_there_is_no_difference_and_small_where_there_is() -> None:
    null = p_values(signals=(1.0, 1.0), count=200)
    assert kstest(null, "uniform").pvalue > 1e-3
    assert 0.01 <= (null < 0.05).mean() <= 0.12
    assert (p_values(signals=(0.3, 2.5), count=20) < 0.02).all()


def test_the_two_sided_p_value_by_hand() -> None:
    assert two_sided(np.array([0.1, 0.2, 0.3, -0.1, 0.4, 0.5, 0.6, 0.7, 0.8])) == pytest.approx(2 * (1 + 1) / 10)
    assert two_sided(-np.arange(1.0, 1000.0)) == pytest.approx(0.002)
    assert two_sided(np.zeros(99)) == 1.0
    assert two_sided(np.empty(0)) is None


def test_resamples_without_a_value_are_left_out_and_counted() -> None:
    value = {"auroc": 0.75}
    method = Resampled(value, {"auroc": np.array([0.8, math.nan, 0.7, 0.9])})
    found = paired_difference(method, Resampled({"auroc": 0.5}, {"auroc": np.array([0.5, 0.5, 0.5, math.nan])}))
    assert (found.value, found.undefined, found.p) == (0.25, 2, pytest.approx(2 / 3))
    assert found.low == pytest.approx(0.2 + 0.025 * 0.1)


def slow_delong(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations 2 to 6 of DeLong et al. as they stand: every positive against every negative."""
    positives, negatives = scores[:, truth], scores[:, ~truth]
    wins = (positives[:, :, None] > negatives[:, None, :]) + 0.5 * (positives[:, :, None] == negatives[:, None, :])
    v10, v01 = wins.mean(axis=2), wins.mean(axis=1)
    areas = wins.mean(axis=(1, 2))
    m, n = v10.shape[1], v01.shape[1]
    s10 = (v10 - areas[:, None]) @ (v10 - areas[:, None]).T / (m - 1)
    s01 = (v01 - areas[:, None]) @ (v01 - areas[:, None]).T / (n - 1)
    return areas, s10 / m + s01 / n


def test_delong_is_that_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    for size in (5, 20, 61):
        truth = np.arange(size) % 3 == 0
        scores = (rng.normal(size=(3, size)) + truth).round(1)  # with ties
        areas, covariance = areas_with_covariance(truth, scores)
        expected_areas, expected = slow_delong(truth, scores)
        np.testing.assert_allclose(areas, expected_areas)
        np.testing.assert_allclose(covariance, expected, atol=1e-15)
        assert areas[0] == pytest.approx(roc_auc_score(truth, scores[0]))


def test_delong_over_folds_adds_the_variances() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(60) % 2 == 0
    one, other = rng.normal(size=(2, 60)) + truth * np.array([[1.5], [0.4]])
    folds = [np.arange(0, 30), np.arange(30, 60)]
    parts = [slow_delong(truth[rows], np.stack([one, other])[:, rows]) for rows in folds]
    difference = np.mean([areas[0] - areas[1] for areas, _ in parts])
    variance = sum(c[0, 0] + c[1, 1] - 2 * c[0, 1] for _, c in parts) / 4
    found = delong(truth, one, other, folds)
    assert found is not None
    assert found.difference == pytest.approx(difference)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.p == pytest.approx(2 * norm.sf(abs(difference) / math.sqrt(variance)))
    back = delong(truth, other, one, folds)
    assert back is not None
    assert back.p == pytest.approx(found.p)


def test_delong_where_there_is_no_variance() -> None:
    truth = np.array([True, True, False, False])
    perfect, folds = np.array([3.0, 4.0, 1.0, 2.0]), [np.arange(4)]
    same = delong(truth, perfect, perfect * 2, folds)
    assert same is not None
    assert (same.difference, same.p) == (0.0, 1.0)
    assert delong(truth, perfect, -perfect, folds) is None
    assert delong(truth, perfect, perfect, [np.array([0, 1, 2]), np.array([3])]) is None


def test_the_bootstrap_and_delong_agree_on_a_large_cohort() -> None:
    units = cohort(600, folds=3)
    methods = {
        "one": probabilities(units, signal=1.0, seed=0),
        "other": probabilities(units, signal=0.8, seed=1),
    }
    drawn = bootstrap(units, methods, "ab", resamples=2000, seed=0)
    found = paired_difference(drawn["one"], drawn["other"])
    truth = (units["label"] == "b").to_numpy()
    classical = delong(truth, methods["one"][:, 1], methods["other"][:, 1], rows_of_folds(units))
    assert classical is not None
    assert found.value == pytest.approx(classical.difference)
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(classical.error, rel=0.1)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_counts_tests_that_are_still_to_come() -> None:
    assert holm({"a": 0.01, "b": None, "c": 0.02}) == pytest.approx({"a": 0.03, "b": None, "c": 0.04})
