"""Numbers against hand counts and scikit-learn, and intervals against their definition."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

from wholeslide.errors import CohortError, ConfigError
from wholeslide.metrics import LOWER_IS_BETTER, METRICS, aggregate, auroc, evaluate, score

CLASSES = {count: [f"c{number}" for number in range(count)] for count in (2, 3, 4)}


def frame(labels: Sequence[str], probabilities: Any, classes: Sequence[str], **columns: Any) -> pd.DataFrame:
    files = [f"f{number}" for number in range(len(labels))]
    table = pd.DataFrame({"file": files, "slide": files, "patient": files, "label": list(labels)}).assign(**columns)
    table["prediction"] = [classes[index] for index in np.argmax(probabilities, axis=1)]
    for index, name in enumerate(classes):
        table[f"prob_{name}"] = np.asarray(probabilities, dtype=float)[:, index]
    return table


def binary(labels: str, positive: Sequence[float], **columns: Any) -> pd.DataFrame:
    """Labels as letters, ``n`` or ``p``, and the probability of ``p``."""
    return frame(list(labels), [(1 - p, p) for p in positive], ["n", "p"], **columns)


def drawn(count: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(count), rng.integers(0, count, n - count)])
    logits = np.round(rng.normal(size=(n, count)) + np.eye(count)[truth], 1)  # rounded: with ties
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return truth, probabilities, frame([f"c{label}" for label in truth], probabilities, CLASSES[count])


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: result[name]["value"] for name in METRICS}


def test_two_classes_by_hand() -> None:
    result = evaluate(binary("nnnppp", [0.1, 0.6, 0.2, 0.9, 0.4, 0.8]), classes=["n", "p"], unit="file")
    expected = {
        "accuracy": 4 / 6,
        "balanced_accuracy": 2 / 3,
        "sensitivity": 2 / 3,
        "specificity": 2 / 3,
        "auroc": 8 / 9,  # of nine pairs, only (0.4, 0.6) is the wrong way round
        "f1": 2 / 3,
        "brier": (0.01 + 0.36 + 0.04 + 0.01 + 0.36 + 0.04) / 6,
        # confidence 0.9, 0.9 in one bin, 0.6, 0.6 (both wrong) in another, 0.8, 0.8 in a third
        "calibration_error": (2 * 0.1 + 2 * 0.6 + 2 * 0.2) / 6,
    }
    assert values(result) == pytest.approx(expected)
    assert result["confusion"]["value"] == [[2, 1], [1, 2]]
    assert (result["unit"], result["n"], result["patients"], result["positive"]) == ("file", 6, 6, "p")


def test_the_positive_class_is_the_last() -> None:
    table = frame(["b", "a", "a", "a"], [(0.1, 0.9), (0.8, 0.2), (0.3, 0.7), (0.2, 0.8)], ["a", "b"])
    result = evaluate(table, classes=["a", "b"], unit="file")
    assert result["positive"] == "b"
    assert result["sensitivity"]["value"] == 1
    assert result["specificity"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_scikit_learns(count: int, seed: int) -> None:
    truth, probabilities, table = drawn(count, 60, seed)
    result = evaluate(table, classes=CLASSES[count], unit="file", resamples=10)
    called = probabilities.argmax(axis=1)
    average = "binary" if count == 2 else "macro"
    area = reference.roc_auc_score(truth, probabilities[:, 1] if count == 2 else probabilities, multi_class="ovr")
    recalls = [(reference.recall_score(truth == c, called == c)) for c in range(count)]
    specificities = [reference.recall_score(truth != c, called != c) for c in range(count)]
    expected = {
        "accuracy": reference.accuracy_score(truth, called),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, called),
        "sensitivity": recalls[1] if count == 2 else np.mean(recalls),
        "specificity": specificities[1] if count == 2 else np.mean(specificities),
        "auroc": area,
        "f1": reference.f1_score(truth, called, average=average),
        "brier": np.mean(((np.eye(count)[truth] - probabilities) ** 2).sum(axis=1)) / (2 if count == 2 else 1),
    }
    found = values(result)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert result["confusion"]["value"] == reference.confusion_matrix(truth, called).tolist()
    assert score(table, CLASSES[count], "file", "loss") == pytest.approx(reference.log_loss(truth, probabilities))
    assert {name: score(table, CLASSES[count], "file", name) for name in METRICS} == pytest.approx(found)


def test_calibration_error_by_its_definition() -> None:
    truth, probabilities, table = drawn(3, 200, 0)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    expected = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert score(table, CLASSES[3], "file", "calibration_error") == pytest.approx(expected)


def test_auroc_with_ties_and_weights() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(80) < 0.4
    scores = np.round(rng.random(80), 1)
    weights = rng.integers(0, 4, size=(25, 80)).astype(float)
    areas = auroc(truth, scores, weights)
    for area, weight in zip(areas, weights, strict=True):
        assert area == pytest.approx(reference.roc_auc_score(truth, scores, sample_weight=weight))
    assert auroc(truth, scores)[0] == pytest.approx(reference.roc_auc_score(truth, scores))
    assert auroc(truth, np.zeros(80))[0] == 0.5
    assert np.isnan(auroc(np.ones(3, dtype=bool), np.arange(3.0)))[0]
    assert np.isnan(auroc(np.zeros(0, dtype=bool), np.zeros(0)))[0]


def test_infinite_scores_are_ordered() -> None:
    truth = np.array([True, False, True])
    assert auroc(truth, np.array([0.5, -math.inf, math.inf]))[0] == 1


def test_probabilities_are_averaged_file_slide_patient() -> None:
    """A slide with many files weighs no more than its patient's other slide."""
    table = binary("pppn", [0.9, 0.9, 0.3, 0.2], slide=["s", "s", "t", "u"], patient=["x", "x", "x", "y"])
    files = aggregate(table, "file", ["n", "p"])
    assert list(files) == ["file", "slide", "patient", "label", "prediction", "prob_n", "prob_p"]
    assert len(files) == 4
    slides = aggregate(table, "slide", ["n", "p"])
    assert list(slides) == ["slide", "patient", "label", "prediction", "prob_n", "prob_p"]
    assert slides["prob_p"].tolist() == pytest.approx([0.9, 0.3, 0.2])
    patients = aggregate(table, "patient", ["n", "p"])
    assert list(patients) == ["patient", "label", "prediction", "prob_n", "prob_p"]
    assert patients["patient"].tolist() == ["x", "y"]
    assert patients["prob_p"].tolist() == pytest.approx([0.6, 0.2])
    assert patients["prediction"].tolist() == ["p", "n"]
    assert patients["label"].tolist() == ["p", "n"]


def test_a_slides_name_may_repeat_between_patients() -> None:
    table = binary("pn", [0.9, 0.1], slide=["1", "1"], patient=["x", "y"])
    assert aggregate(table, "slide", ["n", "p"])["label"].tolist() == ["p", "n"]


def test_a_patient_with_two_labels_has_no_label() -> None:
    table = binary("pnp", [0.9, 0.1, 0.8], patient=["x", "x", "y"])
    with pytest.raises(CohortError) as caught:
        evaluate(table, classes=["n", "p"], unit="patient")
    assert str(caught.value) == "files labelled n and p (patient x): score each file by itself: --unit file"
    assert aggregate(table, "patient", ["n", "p"], conflicting_labels="blank")["label"].tolist() == ["", "p"]
    assert evaluate(table, classes=["n", "p"], unit="slide")["n"] == 3


def test_unlabelled_and_unpredicted_rows_are_counted_and_left_out() -> None:
    table = binary("nnppp", [0.1, 0.2, 0.9, 0.8, 0.3])
    table.loc[1, "label"] = ""
    table.loc[2, "label"] = math.nan
    table.loc[4, ["prob_n", "prob_p"]] = math.nan
    result = evaluate(table, classes=["n", "p"], unit="patient")
    assert (result["n"], result["unlabelled"], result["unpredicted"]) == (2, 2, 1)
    assert result["accuracy"]["value"] == 1


def test_tables_that_a_reader_took_for_numbers() -> None:
    """Labels 0 and 1 and numbered patients come back from a CSV as integers, or as floats where one is missing."""
    table = frame(["0", "1", "1"], [(0.9, 0.1), (0.2, 0.8), (0.3, 0.7)], ["0", "1"])
    table = table.assign(label=[0.0, 1.0, math.nan], patient=[7, 8, 9])
    result = evaluate(table, classes=["0", "1"], unit="patient")
    assert (result["n"], result["unlabelled"]) == (2, 1)
    assert aggregate(table, "patient", ["0", "1"])["patient"].tolist() == ["7", "8", "9"]


def test_one_class_leaves_metrics_undefined_with_a_reason() -> None:
    result = evaluate(binary("nnn", [0.1, 0.6, 0.2]), classes=["n", "p"], unit="file")
    undefined = {"value": None, "low": None, "high": None, "reason": "no p in this split"}
    for name in ("auroc", "balanced_accuracy", "sensitivity", "f1"):
        assert result[name] == undefined
    assert result["specificity"]["value"] == pytest.approx(2 / 3)
    assert result["accuracy"]["value"] == pytest.approx(2 / 3)
    assert math.isnan(score(binary("nnn", [0.1, 0.6, 0.2]), ["n", "p"], "file", "auroc"))
    result = evaluate(binary("pp", [0.1, 0.6]), classes=["n", "p"], unit="file")
    assert result["specificity"]["reason"] == result["auroc"]["reason"] == "no n in this split"
    assert result["sensitivity"]["value"] == 0.5
    assert result["f1"]["value"] == pytest.approx(2 / 3)
    json.dumps(result, allow_nan=False)


def test_three_classes_one_absent() -> None:
    table = frame(["c0", "c1"], [(0.8, 0.1, 0.1), (0.1, 0.8, 0.1)], CLASSES[3])
    result = evaluate(table, classes=CLASSES[3], unit="file")
    for name in ("auroc", "balanced_accuracy", "sensitivity", "f1"):
        assert result[name]["value"] is None
        assert result[name]["reason"] == "no c2 in this split"
    assert result["specificity"]["value"] == 1  # a class that is absent still can be called wrongly
    assert result["positive"] is None


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_labelled(rows: int) -> None:
    table = binary("nn", [0.1, 0.2]).assign(label="").head(rows)
    result = evaluate(table, classes=["n", "p"], unit="patient")
    assert (result["n"], result["unlabelled"]) == (0, rows)
    assert all(result[name]["reason"] == "no labelled unit in this split" for name in METRICS)
    assert result["confusion"] == {"classes": ["n", "p"], "value": [[0, 0], [0, 0]], "low": None, "high": None}
    assert math.isnan(score(table, ["n", "p"], "patient", "loss"))


def test_what_cannot_be_scored() -> None:
    table = binary("np", [0.1, 0.9])
    with pytest.raises(CohortError) as caught:
        evaluate(table.assign(label=["x", "y"]), classes=["n", "p"], unit="file")
    assert str(caught.value).splitlines() == [
        "unknown label 'x' (f0): use one of n, p",
        "unknown label 'y' (f1): use one of n, p",
    ]
    with pytest.raises(CohortError, match=r"no columns patient, prob_q \(predictions\)"):
        evaluate(table.drop(columns="patient"), classes=["n", "q"], unit="file")
    with pytest.raises(ConfigError, match=r"no such unit \(--unit case\): use one of patient, slide, file"):
        evaluate(table, classes=["n", "p"], unit="case")
    with pytest.raises(ConfigError, match=r"no such metric \(kappa\): use one of accuracy, .*, loss"):
        score(table, ["n", "p"], "file", "kappa")


def test_loss_of_a_certain_mistake_is_finite() -> None:
    assert 100 < score(binary("p", [0.0]), ["n", "p"], "file", "loss") < 1000
    assert set(METRICS) > LOWER_IS_BETTER - {"loss"}


def test_intervals_are_those_of_the_obvious_bootstrap() -> None:
    """Resample patients of each class, rebuild the table, score it with scikit-learn."""
    truth, probabilities, _ = drawn(2, 60, 3)
    patients = truth * 100 + np.arange(60) // 3
    table = frame([f"c{label}" for label in truth], probabilities, CLASSES[2], patient=[str(p) for p in patients])
    result = evaluate(table, classes=CLASSES[2], unit="file", resamples=2000)
    rng = np.random.default_rng(1)
    areas, hits = [], []
    for _ in range(400):
        chosen = [rng.choice(names, len(names)) for names in (np.unique(patients[truth == c]) for c in (0, 1))]
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in np.concatenate(chosen)])
        areas.append(reference.roc_auc_score(truth[rows], probabilities[rows, 1]))
        hits.append((probabilities[rows].argmax(axis=1) == truth[rows]).mean())
    for name, slow in (("auroc", areas), ("accuracy", hits)):
        low, high = np.percentile(slow, [2.5, 97.5])
        assert result[name]["low"] == pytest.approx(low, abs=0.025)
        assert result[name]["high"] == pytest.approx(high, abs=0.025)


def test_intervals_are_the_percentiles_of_a_known_distribution() -> None:
    """Of 100 patients half are found: the resampled sensitivity is Binomial(100, 1/2) / 100."""
    table = binary("n" * 20 + "p" * 100, [0.1] * 20 + [0.1, 0.9] * 50)
    sensitivity = evaluate(table, classes=["n", "p"], resamples=4000)["sensitivity"]
    assert sensitivity["value"] == 0.5
    assert sensitivity["low"] == pytest.approx(0.40, abs=0.011)
    assert sensitivity["high"] == pytest.approx(0.60, abs=0.011)


def test_each_resample_has_as_many_of_each_class() -> None:
    result = evaluate(drawn(3, 90, 0)[2], classes=CLASSES[3], unit="patient")
    rows = np.array(result["confusion"]["value"]).sum(axis=1)
    for bound in ("low", "high"):
        assert np.array(result["confusion"][bound]).shape == (3, 3)
        assert (np.array(result["confusion"][bound]) <= rows[:, None]).all()
    perfect = binary("n" * 10 + "p" * 10, [0.1] * 10 + [0.9] * 10)
    confusion = evaluate(perfect, classes=["n", "p"], unit="patient")["confusion"]
    assert confusion["low"] == confusion["high"] == confusion["value"] == [[10, 0], [0, 10]]


def test_patients_are_resampled_not_files() -> None:
    """Thirty copies of each file say no more than one."""
    once = drawn(2, 40, 5)[2]
    copies = pd.concat([once] * 30, ignore_index=True)
    copies["file"] = [f"{file}-{number}" for number, file in enumerate(copies["file"])]
    copies["slide"] = copies["file"]
    one = evaluate(once, classes=CLASSES[2], unit="file")
    many = evaluate(copies, classes=CLASSES[2], unit="file")
    assert many["n"] == 1200
    assert many["patients"] == 40
    for name in METRICS:
        assert many[name]["low"] == pytest.approx(one[name]["low"])
        assert many[name]["high"] == pytest.approx(one[name]["high"])


def test_intervals_cover_the_truth() -> None:
    """Of 95% intervals for an accuracy known to be 0.8, most hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(80):
        right = rng.random(100) < 0.8
        labels = "n" * 50 + "p" * 50
        positive = [0.9 if (label == "p") == hit else 0.1 for label, hit in zip(labels, right, strict=True)]
        accuracy = evaluate(binary(labels, positive), classes=["n", "p"], resamples=200)["accuracy"]
        held += accuracy["low"] <= 0.8 <= accuracy["high"]
    assert 0.87 <= held / 80 <= 0.99


def test_patients_of_several_labels() -> None:
    """Three patients, each with another set of labels: resampled within the set they would show no spread at all."""
    labels = "nnnn" + "pppp" + "nnpp"
    positive = [0.1, 0.2, 0.3, 0.6, 0.9, 0.8, 0.7, 0.4, 0.2, 0.6, 0.3, 0.8]
    table = binary(labels, positive, patient=["x"] * 4 + ["y"] * 4 + ["z"] * 4)
    result = evaluate(table, classes=["n", "p"], unit="file")
    assert result["auroc"]["low"] < result["auroc"]["value"] < result["auroc"]["high"]
    assert result["accuracy"]["low"] < result["accuracy"]["high"]
    assert "note" not in result


def test_a_class_of_one_patient_is_noted() -> None:
    result = evaluate(binary("nnnp", [0.1, 0.6, 0.2, 0.9]), classes=["n", "p"])
    assert result["note"] == "1 of 2 classes have one patient only: the intervals are too narrow"


def test_one_patient_a_class_gives_no_interval() -> None:
    """Nobody can be resampled: an interval would have no width, and look like certainty."""
    table = binary("nnpp", [0.1, 0.6, 0.2, 0.9], patient=["x", "x", "y", "y"])
    result = evaluate(table, classes=["n", "p"])
    assert result["note"] == "one patient a class: no interval can be given"
    assert result["auroc"]["value"] is not None
    assert result["auroc"]["low"] is result["auroc"]["high"] is None
    assert result["confusion"]["low"] is None


def test_the_seed_and_nothing_else_decides() -> None:
    table = drawn(2, 50, 0)[2]
    one = evaluate(table, classes=CLASSES[2], seed=1)
    np.random.default_rng().random()
    assert evaluate(table, classes=CLASSES[2], seed=1) == one
    assert evaluate(table.sample(frac=1, random_state=0), classes=CLASSES[2], seed=1)["auroc"] == pytest.approx(
        one["auroc"]
    )
    assert evaluate(table, classes=CLASSES[2], seed=2)["auroc"] != one["auroc"]


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = drawn(2, 50, 0)[2]
    whole = evaluate(table, classes=CLASSES[2], resamples=500)
    monkeypatch.setattr("wholeslide.metrics._CHUNK_CELLS", 50 * 7)
    chunked = evaluate(table, classes=CLASSES[2], resamples=500)
    assert chunked["resamples"] == 500
    for name in METRICS:
        assert chunked[name]["value"] == whole[name]["value"]
        assert chunked[name]["low"] == pytest.approx(whole[name]["low"], abs=0.05)


def test_the_json_is_plain() -> None:
    result = evaluate(drawn(3, 30, 0)[2], classes=CLASSES[3])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
