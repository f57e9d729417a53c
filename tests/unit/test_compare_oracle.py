"""The statistics of a comparison against loops: every pair is looked at, every patient drawn by hand, all in exact fractions."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from wholeslide.compare.delong import areas_with_covariance, delong
from wholeslide.compare.holm import holm
from wholeslide.compare.paired import paired_difference
from wholeslide.compare.predictions import Collected
from wholeslide.compare.protocol import Protocol
from wholeslide.compare.resampling import bootstrap, rows_of_folds
from wholeslide.compare.summary import Row, Summary, summarise
from wholeslide.metrics import METRICS, patient_counts

BINS = 15
TWINS, TWIN_DRAWS = range(6), 150


@dataclass(frozen=True)
class File:
    patient: str
    slide: str
    file: str
    fold: str
    label: str


@dataclass(frozen=True)
class Unit:
    """Its weight in the resample, and its probabilities."""

    truth: int
    powers: tuple[float, ...]
    weight: Fraction


def files_of(
    *, classes: str, folds: int, patients: int, files: int = 1, mixed: bool = False, seed: int = 0
) -> list[File]:
    """``patients`` of each class in each fold, in a shuffled order; ``mixed`` patients have a file of the next class as well."""
    found = []
    for fold, label, number in itertools.product(range(folds), classes, range(patients)):
        patient = f"p{fold}{label}{number}"
        for at in range(files):
            other = mixed and number == 0 and at == 0
            own = classes[(classes.index(label) + 1) % len(classes)] if other else label
            found.append(File(patient, f"{patient}-{at // 2}", f"{patient}-{at}", str(fold), own))
    return [found[at] for at in np.random.default_rng(seed).permutation(len(found))]


def predicted(files: list[File], classes: str, *, signal: float, seed: int, digits: int = 2) -> pd.DataFrame:
    """Rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(files), len(classes))) + [[signal * (f.label == c) for c in classes] for f in files]
    powers = np.exp(logits)
    table = pd.DataFrame([vars(file) for file in files])
    rounded = (powers / powers.sum(axis=1, keepdims=True)).round(digits)
    return table.assign(**{f"prob_{name}": rounded[:, at] for at, name in enumerate(classes)})


def protocol(
    methods: str, classes: str, *, folds: int, unit: str = "file", seeds: int = 1, resamples: int = 40
) -> Protocol:
    facts: dict[str, Any] = {
        "cohort": {"classes": list(classes), "unit": unit},
        "folds": {"parts": [{"fold": str(number)} for number in range(folds)]},
        "seeds": list(range(seeds)),
        "reference": methods[0],
        "primary": {"resamples": resamples, "seed": 3},
    }
    return Protocol(facts, {name: {} for name in methods}, {}, "")


def summary_of(
    agreed: Protocol, files: list[File], by_seed: dict[tuple[str, int], pd.DataFrame], incomplete: str = ""
) -> Summary:
    """Of predictions by method and seed."""
    tables = [table.assign(method=method, seed=seed) for (method, seed), table in by_seed.items()]
    together = pd.concat(tables, ignore_index=True)
    columns = [name for name in together if name.startswith("prob_")]
    keys = ["method", "fold", "file", "slide", "patient", "label"]
    averaged = together.groupby(keys, sort=False, as_index=False)[columns].mean()
    folds = pd.DataFrame([vars(file) for file in files])
    return summarise(agreed, folds, [], Collected(averaged, together, {name: ["it broke"] for name in incomplete}))


def area_by_pairs(units: list[Unit], positive: int) -> Fraction | None:
    """Every positive against every negative."""
    won = total = Fraction(0)
    for one, other in itertools.product(units, units):
        if one.truth == positive and other.truth != positive:
            pair = one.weight * other.weight
            total += pair
            mine, theirs = one.powers[positive], other.powers[positive]
            won += pair * (Fraction(1) if mine > theirs else Fraction(1, 2) if mine == theirs else Fraction(0))
    return won / total if total else None


def area_of_folds(folds: dict[str, list[Unit]], classes: int) -> Fraction | None:
    found = []
    for units in folds.values():
        areas = [area_by_pairs(units, c) for c in ([1] if classes == 2 else range(classes))]
        if None in areas:
            return None
        found.append(sum((area for area in areas if area is not None), Fraction(0)) / len(areas))
    return sum(found, Fraction(0)) / len(found)


def others_by_hand(units: list[Unit], classes: int) -> dict[str, float]:
    """Accuracy, balanced accuracy, Brier score and calibration error, unit by unit."""
    total = float(sum(unit.weight for unit in units))
    right, brier = 0.0, 0.0
    recalls: dict[int, list[float]] = {c: [0.0, 0.0] for c in range(classes)}
    bins = [0.0] * BINS
    for unit in units:
        weight, called = float(unit.weight), unit.powers.index(max(unit.powers))
        hit = called == unit.truth
        right += weight * hit
        recalls[unit.truth][0] += weight * hit
        recalls[unit.truth][1] += weight
        errors = [(p - (c == unit.truth)) ** 2 for c, p in enumerate(unit.powers)]
        brier += weight * (errors[1] if classes == 2 else sum(errors))
        inside = next(at for at in range(BINS) if max(unit.powers) <= (at + 1) / BINS or at == BINS - 1)
        bins[inside] += weight * (hit - max(unit.powers))
    return {
        "accuracy": right / total,
        "balanced_accuracy": float(np.mean([hits / count for hits, count in recalls.values()])),
        "brier": brier / total,
        "calibration_error": sum(map(abs, bins)) / total,
    }


def draws_by_hand(files: list[File], resamples: int, seed: int) -> list[dict[str, Fraction]]:
    """How often each patient counts: of k of a fold and set of labels k − 1 are drawn, and count k / (k − 1)."""
    labels = defaultdict(set)
    fold_of = {}
    for file in files:
        labels[file.patient].add(file.label)
        fold_of[file.patient] = file.fold
    rng = np.random.default_rng(seed)
    found: list[dict[str, Fraction]] = [{} for _ in range(resamples)]
    for fold in sorted(set(fold_of.values())):
        groups = defaultdict(list)
        for patient in sorted(fold_of):
            if fold_of[patient] == fold:
                groups[tuple(sorted(labels[patient]))].append(patient)
        drawn_from = [groups[key] for key in sorted(groups)]
        if any(len(key) > 1 for key in groups):
            alone = [members[0] for members in drawn_from if len(members) == 1]
            drawn_from = [members for members in drawn_from if len(members) > 1] + [alone] * bool(alone)
        for members in drawn_from:
            size = len(members)
            draws = max(1, size - 1)
            counts = rng.multinomial(draws, [1 / size] * size, size=resamples)
            for times, row in zip(found, counts, strict=True):
                times.update({name: Fraction(int(n) * size, draws) for name, n in zip(members, row, strict=True)})
    return found


def units_by_hand(
    files: list[File], table: pd.DataFrame, classes: str, unit: str, times: dict[str, Fraction]
) -> dict[str, list[Unit]]:
    """By fold: files are averaged to slides, and slides to patients."""
    power_of = {row["file"]: [row[f"prob_{c}"] for c in classes] for row in table.to_dict("records")}
    slides: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        slides[file.patient][file.slide].append(power_of[file.file])
    found: dict[str, list[Unit]] = defaultdict(list)
    seen = set()
    for file in files:
        name = getattr(file, unit)
        if name in seen:
            continue
        seen.add(name)
        if unit == "file":
            powers = np.array(power_of[name])
        elif unit == "slide":
            powers = np.mean(slides[file.patient][name], axis=0)
        else:
            powers = np.mean([np.mean(rows, axis=0) for rows in slides[name].values()], axis=0)
        found[file.fold].append(Unit(classes.index(file.label), tuple(powers.tolist()), times[file.patient]))
    return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def assert_by_hand(
    row: Row, folds: list[dict[str, list[Unit]]], reference: list[dict[str, list[Unit]]], classes: int
) -> None:
    """``folds`` and those of the reference: first the cohort's, then those of each resample."""
    own, other = ([area_of_folds(units, classes) for units in found] for found in (folds, reference))
    assert None not in (*own, *other)
    areas, others = ([area for area in found if area is not None] for found in (own, other))
    metrics = [others_by_hand([u for units in found.values() for u in units], classes) for found in folds]
    drawn = {name: [found[name] for found in metrics] for name in metrics[0]} | {"auroc": [float(a) for a in areas]}
    for name, (value, *resampled) in drawn.items():
        figure = row.figures[name]
        found = (figure.value, figure.low, figure.high)
        assert found == pytest.approx((value, percentile(resampled, 0.025), percentile(resampled, 0.975)), abs=1e-12)
    if row.reference:
        assert row.difference is None
        return
    value, *differences = [one - two for one, two in zip(areas, others, strict=True)]
    smaller = min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences))
    assert row.difference is not None
    assert row.difference.p == min(1.0, 2 * (smaller + 1) / (len(differences) + 1))
    found = (row.difference.value, row.difference.low, row.difference.high)
    bounds = [percentile([float(d) for d in differences], share) for share in (0.025, 0.975)]
    assert found == pytest.approx((float(value), *bounds), abs=1e-12)


@pytest.mark.parametrize(
    ("classes", "unit", "files", "mixed"),
    [
        ("ab", "file", 1, False),
        ("ab", "patient", 3, False),
        ("ab", "slide", 3, False),
        ("abc", "file", 2, False),
        ("abc", "patient", 1, False),
        ("ab", "file", 2, True),
    ],
)
def test_every_number_is_that_of_loops(classes: str, unit: str, files: int, mixed: bool) -> None:
    cohort = files_of(classes=classes, folds=3, patients=2 if len(classes) == 3 else 3, files=files, mixed=mixed)
    cohort = [file for file in cohort if file.patient != "p0a2"]  # where there are three: groups of two sizes
    agreed = protocol("rmn", classes, folds=3, unit=unit)
    tables = {
        name: predicted(cohort, classes, signal=signal, seed=at, digits=1 if name == "n" else 2)
        for at, (name, signal) in enumerate([("r", 1.0), ("m", 1.2), ("n", 0.9)])
    }
    found = summary_of(agreed, cohort, {(name, 0): table for name, table in tables.items()})
    once = {file.patient: Fraction(1) for file in cohort}
    draws = [once, *draws_by_hand(cohort, 40, seed=3)]
    by_hand = {name: [units_by_hand(cohort, table, classes, unit, t) for t in draws] for name, table in tables.items()}
    for row in found.rows:
        assert_by_hand(row, by_hand[row.method], by_hand["r"], len(classes))
    p_values = {row.method: row.difference.p for row in found.rows[1:] if row.difference is not None}
    one, two = p_values["m"], p_values["n"]
    assert one is not None
    assert two is not None
    low, high = min(2 * min(one, two), 1), min(max(2 * min(one, two), max(one, two)), 1)
    assert sorted(row.p_holm for row in found.rows[1:] if row.p_holm is not None) == pytest.approx([low, high])


def twins(seed: int) -> tuple[list[File], list[pd.DataFrame]]:
    """Two methods whose areas are often equal, though not summed from the same parts; weights are thirds, and sums rounded."""
    cohort = files_of(classes="ab", folds=3, patients=4)
    return cohort, [predicted(cohort, "ab", signal=1.0, seed=2 * seed + at, digits=1) for at in range(2)]


def p_of_twins(seed: int) -> float:
    cohort, tables = twins(seed)
    powers = {str(at): table[["prob_a", "prob_b"]].to_numpy() for at, table in enumerate(tables)}
    drawn = bootstrap(pd.DataFrame([vars(file) for file in cohort]), powers, "ab", resamples=TWIN_DRAWS, seed=seed)
    p = paired_difference(drawn["1"], drawn["0"]).p
    assert p is not None
    return p


@functools.cache
def p_of_twins_by_hand(seed: int) -> float:
    cohort, tables = twins(seed)
    areas = []
    for table in tables:
        folds = [units_by_hand(cohort, table, "ab", "file", t) for t in draws_by_hand(cohort, TWIN_DRAWS, seed)]
        areas.append([area_of_folds(inside, 2) for inside in folds])
    signs = [(b > a) - (b < a) for a, b in zip(*areas, strict=True) if a is not None and b is not None]
    smaller = min(sum(sign <= 0 for sign in signs), sum(sign >= 0 for sign in signs))
    return min(1.0, 2 * (smaller + 1) / (TWIN_DRAWS + 1))


def test_equal_areas_count_on_both_sides() -> None:
    for seed in TWINS:
        assert p_of_twins(seed) == p_of_twins_by_hand(seed)


def test_the_check_of_equal_areas_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wholeslide.compare.paired._TIE", 0.0)
    assert any(p_of_twins(seed) != p_of_twins_by_hand(seed) for seed in TWINS)


def test_a_method_against_its_copy() -> None:
    cohort = files_of(classes="abc", folds=3, patients=3)
    table = predicted(cohort, "abc", signal=1.0, seed=0)
    row = summary_of(protocol("rm", "abc", folds=3), cohort, {("r", 0): table, ("m", 0): table}).rows[1]
    assert row.difference is not None
    assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
    assert (row.difference.p, row.p_holm) == (1, 1)


def test_many_equal_slides_of_a_patient_say_no_more_than_one() -> None:
    once = files_of(classes="ab", folds=3, patients=4)
    often = [File(f.patient, f"{f.slide}-{n}", f"{f.file}-{n}", f.fold, f.label) for f in once for n in range(7)]
    tables = {
        name: predicted(once, "ab", signal=signal, seed=at) for at, (name, signal) in enumerate([("r", 1), ("m", 2)])
    }
    copied = {
        name: table.loc[table.index.repeat(7)].reset_index(drop=True).assign(**pd.DataFrame([vars(f) for f in often]))
        for name, table in tables.items()
    }
    agreed = protocol("rm", "ab", folds=3, resamples=200)
    one = summary_of(agreed, once, {(name, 0): table for name, table in tables.items()})
    many = summary_of(agreed, often, {(name, 0): table for name, table in copied.items()})
    assert (many.units, many.patients) == (7 * one.units, one.patients)
    for left, right in zip(one.rows, many.rows, strict=True):
        for metric in METRICS:
            expected = vars(left.figures[metric])
            assert vars(right.figures[metric]) == pytest.approx(expected, abs=1e-12)
    assert one.rows[1].difference is not None
    assert many.rows[1].difference is not None
    assert vars(many.rows[1].difference) == pytest.approx(vars(one.rows[1].difference), abs=1e-12)


def test_planted_differences_are_found_and_others_are_not() -> None:
    cohort = files_of(classes="ab", folds=5, patients=5)
    signals = {"r": 0.8, "m": 3.0, "n": 0.8, "o": 0.8, "q": -0.8}
    tables = {
        (name, 0): predicted(cohort, "ab", signal=s, seed=at, digits=6) for at, (name, s) in enumerate(signals.items())
    }
    found = summary_of(protocol("rmnoq", "ab", folds=5, resamples=2000), cohort, tables)
    p_of = {row.method: row.p_holm for row in found.rows if row.p_holm is not None}
    assert {name for name, p in p_of.items() if p < 0.05} == {"m", "q"}
    signs = {row.method: row.difference.value for row in found.rows if row.difference is not None}
    assert signs["m"] > 0 > signs["q"]


def test_scores_of_each_training_and_fold() -> None:
    cohort = files_of(classes="abc", folds=3, patients=2, files=3)
    agreed = protocol("rm", "abc", folds=3, unit="patient", seeds=2)
    tables = {
        (name, seed): predicted(cohort, "abc", signal=1, seed=2 * at + seed)
        for at, name in enumerate("rm")
        for seed in (0, 1)
    }
    found = summary_of(agreed, cohort, tables)
    once = {file.patient: Fraction(1) for file in cohort}
    for row in found.rows:
        assert [(of.seed, of.fold) for of in row.by_fold] == [(s, str(f)) for s in (0, 1) for f in range(3)]
        for scores in row.by_fold:
            units = units_by_hand(cohort, tables[row.method, scores.seed], "abc", "patient", once)[scores.fold]
            area = area_of_folds({"": units}, 3)
            assert area is not None
            expected = others_by_hand(units, 3) | {"auroc": float(area)}
            found_here = dict(scores.values)
            assert {name: found_here[name] for name in expected} == pytest.approx(expected)
    assert any("averaged over the 2 trainings of a fold" in note for note in found.notes)


def slow_delong(truth: list[bool], one: list[float], other: list[float]) -> tuple[float, float]:
    """Difference and its variance, by DeLong et al., equations 2 to 6, pair by pair."""

    def won(mine: float, theirs: float) -> float:
        return 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0

    positives = [at for at, true in enumerate(truth) if true]
    negatives = [at for at, true in enumerate(truth) if not true]
    gain = {(p, n): won(one[p], one[n]) - won(other[p], other[n]) for p in positives for n in negatives}
    difference = sum(gain.values()) / len(gain)
    of_positives = [sum(gain[p, n] for n in negatives) / len(negatives) for p in positives]
    of_negatives = [sum(gain[p, n] for p in positives) / len(positives) for n in negatives]
    variances = [
        sum((part - difference) ** 2 for part in parts) / (len(parts) - 1) for parts in (of_positives, of_negatives)
    ]
    return difference, variances[0] / len(positives) + variances[1] / len(negatives)


def test_delong_pair_by_pair_and_fold_by_fold() -> None:
    for seed in range(5):
        cohort = files_of(classes="ab", folds=3, patients=4, seed=seed)
        one, other = (predicted(cohort, "ab", signal=s, seed=2 * seed + s, digits=1)["prob_b"].tolist() for s in (1, 2))
        truth = [file.label == "b" for file in cohort]
        rows = rows_of_folds(pd.DataFrame([vars(file) for file in cohort]))
        parts = [slow_delong(*([values[at] for at in inside] for values in (truth, one, other))) for inside in rows]
        difference, variance = sum(d for d, _ in parts) / 3, sum(v for _, v in parts) / 9
        found = delong(np.array(truth), np.array(one), np.array(other), rows)
        assert found is not None
        assert (found.difference, found.error) == pytest.approx((difference, math.sqrt(variance)))
        assert found.p == pytest.approx(2 * norm.sf(abs(difference) / math.sqrt(variance)))


def test_delong_by_hand() -> None:
    """Positives 3, 1 and negatives 2, 0: one area of 3/4; the other method has them apart."""
    truth = np.array([True, True, False, False])
    areas, covariance = areas_with_covariance(truth, np.array([[3.0, 1, 2, 0], [3, 2, 1, 0]]))
    assert areas.tolist() == [0.75, 1]
    # components of positives 1, 1/2 and of negatives 1/2, 1: each of variance 1/8
    assert covariance.tolist() == [[0.125, 0], [0, 0]]


def correlated(
    rng: np.random.Generator, *, patients: int, files: int, folds: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Two methods as good as each other, which err alike on the same patients. Each has an area of Φ(1/√2)."""
    of_file = np.repeat(np.arange(2 * patients * folds), files)
    truth = of_file % 2
    units = pd.DataFrame(
        {
            "patient": [f"{number:04d}" for number in of_file],
            "fold": (of_file // 2 % folds).astype(str),
            "label": np.where(truth == 1, "b", "a"),
        }
    )
    shared = rng.normal(size=2 * patients * folds)
    methods = {}
    for name in "01":
        own = rng.normal(size=2 * patients * folds)
        scores = truth + (0.5 * shared + 0.5 * own)[of_file] + math.sqrt(0.5) * rng.normal(size=len(of_file))
        share = 1 / (1 + np.exp(-scores))
        methods[name] = np.stack([1 - share, share], axis=1)
    return units, methods


def null(count: int, *, patients: int, files: int, folds: int = 5) -> tuple[np.ndarray, float, float]:
    """p values where there is no difference, and how often intervals hold the area of a method, and the difference of none."""
    rng = np.random.default_rng(0)
    p_values, held, held_difference = [], 0, 0
    for seed in range(count):
        units, methods = correlated(rng, patients=patients, files=files, folds=folds)
        drawn = bootstrap(units, methods, "ab", resamples=199, seed=seed)
        found = paired_difference(drawn["1"], drawn["0"])
        low, high = np.percentile(drawn["0"].drawn["auroc"], [2.5, 97.5])
        held += low <= norm.cdf(1 / math.sqrt(2)) <= high
        assert found.low is not None
        assert found.high is not None
        held_difference += found.low <= 0 <= found.high
        p_values.append(found.p)
    return np.array(p_values, dtype=float), held / count, held_difference / count


def assert_calibrated(found: tuple[np.ndarray, float, float], *, level: tuple[float, float], least: float) -> None:
    p_values, held, held_difference = found
    assert level[0] <= (p_values < 0.05).mean() <= level[1]
    assert (p_values < 0.5).mean() <= 0.6
    assert held >= least
    assert held_difference >= least


def test_two_patients_of_a_class_in_a_fold_are_enough_for_an_honest_p_value() -> None:
    assert_calibrated(null(200, patients=2, files=3), level=(0.02, 0.09), least=0.89)


def test_the_check_of_honest_p_values_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many draws as there are patients, which is common, halve the variance here."""

    def plain(*given: Any, rescaled: bool, **others: Any) -> Any:
        return patient_counts(*given, **others)

    monkeypatch.setattr("wholeslide.compare.resampling.patient_counts", plain)
    with pytest.raises(AssertionError):
        assert_calibrated(null(200, patients=2, files=3), level=(0.02, 0.09), least=0.89)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patients", "files", "least"), [(2, 1, 0.83), (2, 12, 0.88), (5, 1, 0.92), (5, 4, 0.92), (12, 1, 0.92)]
)
def test_p_values_are_honest_and_intervals_hold_on_many_cohorts(patients: int, files: int, least: float) -> None:
    assert_calibrated(null(800, patients=patients, files=files), level=(0.01, 0.07), least=least)


def test_the_spread_of_resamples_is_that_of_cohorts() -> None:
    """So is DeLong's: the difference of 5 patients a class and fold, over 200 cohorts. What errs, errs towards caution."""
    rng = np.random.default_rng(1)
    differences, of_bootstrap, of_delong = [], [], []
    for seed in range(200):
        units, methods = correlated(rng, patients=5, files=1, folds=3)
        drawn = bootstrap(units, methods, "ab", resamples=100, seed=seed)
        found = paired_difference(drawn["1"], drawn["0"])
        classical = delong(
            (units["label"] == "b").to_numpy(), methods["1"][:, 1], methods["0"][:, 1], rows_of_folds(units)
        )
        assert classical is not None
        differences.append(found.value)
        of_bootstrap.append(np.var(drawn["1"].drawn["auroc"] - drawn["0"].drawn["auroc"]))
        of_delong.append(classical.error**2)
    truth = np.var(differences)
    assert np.mean(of_delong) == pytest.approx(truth, rel=0.2)
    assert 0.9 * truth < np.mean(of_bootstrap) < 1.4 * truth


def rejected(p_values: dict[str, float], level: float) -> set[str]:
    """Holm's procedure as it is told: from the smallest on, until one is not below its share of the level."""
    found: set[str] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > level / (len(p_values) - rank):
            break
        found.add(name)
    return found


def test_adjusted_p_values_reject_what_the_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = {name: float(p) for name, p in zip("abcde", rng.uniform(0, 0.2, size=5).round(2) + 0.001, strict=True)}
        adjusted = holm(drawn)
        for level in (0.0101, 0.0501, 0.1003, 0.3007, 0.9):
            assert {name for name, p in adjusted.items() if p is not None and p <= level} == rejected(drawn, level)


def test_holm_by_a_worked_example() -> None:
    found = holm({"a": 0.01, "b": 0.015, "c": 0.02, "d": 0.5, "e": None})
    assert found == pytest.approx({"a": 0.05, "b": 0.06, "c": 0.06, "d": 1.0, "e": None})


def notes_of(methods: str, *, resamples: int = 400, classes: str = "ab", patients: int = 3, signal: float = 1.0) -> str:
    cohort = files_of(classes=classes, folds=3, patients=patients)
    tables = {
        (name, 0): predicted(cohort, classes, signal=signal, seed=at, digits=9) for at, name in enumerate(methods)
    }
    return "\n".join(summary_of(protocol(methods, classes, folds=3, resamples=resamples), cohort, tables).notes)


def test_what_limits_the_numbers_is_told() -> None:
    assert notes_of("rm") == ""
    assert "no test by DeLong: it is for two classes, and there are 3" in notes_of("rm", classes="abc")
    assert "100 resamples are too few for any p (Holm) of 3 tests to fall below 0.05" in notes_of("rmno", resamples=100)
    assert "too few" not in notes_of("rmno", resamples=119)
    assert "too few" in notes_of("rmno", resamples=118)
    assert "the AUROC of r, m is the same on every resample" in notes_of("rm", signal=50)
    assert "no interval and no test" in notes_of("rm", patients=1)


def test_calibration_errors_below_their_intervals_are_told() -> None:
    """Every confidence is right on average: each draw is further from it."""
    cohort = files_of(classes="ab", folds=3, patients=10)
    labels = pd.Series([file.label for file in cohort])
    hits = labels.groupby([file.fold + file.label for file in cohort]).cumcount() < 8
    share = np.where((labels == "b") == hits, 0.8, 0.2)
    table = pd.DataFrame([vars(file) for file in cohort]).assign(prob_a=1 - share, prob_b=share)
    found = summary_of(protocol("r", "ab", folds=3), cohort, {("r", 0): table})
    figure = found.rows[0].figures["calibration_error"]
    assert figure.low is not None
    assert 0 <= figure.value < 1e-9 < figure.low
    assert found.notes == ("the calibration error of r is below its interval: the noise of a resample only adds to it",)


def test_where_nobody_can_be_drawn_there_is_no_interval_and_no_test() -> None:
    cohort = files_of(classes="ab", folds=3, patients=1)
    tables = {(name, 0): predicted(cohort, "ab", signal=signal, seed=0) for name, signal in (("r", -9), ("m", 9))}
    row = summary_of(protocol("rm", "ab", folds=3), cohort, tables).rows[1]
    assert row.difference is not None
    assert (row.difference.value, row.difference.low, row.difference.high) == (1, None, None)
    assert (row.difference.p, row.p_holm) == (None, None)
    assert {(figure.low, figure.high) for figure in row.figures.values()} == {(None, None)}


def test_one_patient_alone_is_told_and_the_others_are_drawn() -> None:
    cohort = [file for file in files_of(classes="ab", folds=3, patients=2) if file.patient != "p0a1"]
    tables = {(name, 0): predicted(cohort, "ab", signal=1, seed=at) for at, name in enumerate("rm")}
    found = summary_of(protocol("rm", "ab", folds=3), cohort, tables)
    assert found.notes[0].startswith("1 of 6 groups of patients of one fold and class have one member")
    figure = found.rows[0].figures["auroc"]
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low < figure.high


def test_resamples_without_a_class_are_counted() -> None:
    """In fold 0 only patients of both labels, and one of a alone: all of b may be missing in a draw."""
    cohort = files_of(classes="ab", folds=3, patients=2)
    cohort = [file for file in cohort if file.patient not in ("p0b0", "p0b1", "p0a1")]
    cohort += [File("p0x", "p0x", f"p0x-{label}", "0", label) for label in "ab"]
    tables = {(name, 0): predicted(cohort, "ab", signal=1, seed=at) for at, name in enumerate("rm")}
    found = summary_of(protocol("rm", "ab", folds=3, resamples=200), cohort, tables)
    draws = draws_by_hand(cohort, 200, seed=3)
    without = sum(times["p0x"] == 0 for times in draws)
    assert 60 < without < 140
    assert f"{without} resamples without a class in some fold are left out" in "\n".join(found.notes)
    assert found.rows[1].difference is not None
    assert found.rows[1].difference.undefined == without
