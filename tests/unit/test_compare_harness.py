"""A comparison from beginning to end, with methods that need no training."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compare_cases import SIGNAL, Fake, config, write_cohort
from sklearn.metrics import roc_auc_score

from wholeslide.compare.harness import Comparison, compare
from wholeslide.compare.predictions import read_predictions
from wholeslide.compare.resampling import bootstrap, fold_strata
from wholeslide.errors import CohortError, RunError
from wholeslide.metrics import patient_counts, score

RESULTS = ("predictions.csv", "table.csv", "table.md", "table.tex", "results.json")
TIMES = ["train_seconds", "cpu_seconds", "test_seconds", "peak_bytes"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def done(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods on three folds, finished in one go."""
    out = tmp_path_factory.mktemp("done") / "compared"
    found = compare(config(manifest, out, *THREE), worker=Fake().work)
    assert (found.failed, found.unfinished) == ((), 0)
    return out


THREE = ("max", "abmil", "clam-sb")


def without_times(out: Path) -> tuple[bytes, pd.DataFrame]:
    """What two runs of the same comparison must share: predictions to the byte, and the table but for its costs."""
    return (out / "predictions.csv").read_bytes(), pd.read_csv(out / "table.csv").drop(columns=TIMES)


def assert_same(out: Path, other: Path) -> None:
    (left, left_table), (right, right_table) = without_times(out), without_times(other)
    assert left == right
    pd.testing.assert_frame_equal(left_table, right_table)


def test_every_file_is_predicted_once_by_every_method(manifest: Path, done: Path) -> None:
    table = read_predictions(done / "predictions.csv")
    assert list(table) == ["method", "fold", "file", "slide", "patient", "label", "prediction", "prob_a", "prob_b"]
    files = sorted(pd.read_csv(manifest)["file"])
    folds = pd.read_csv(done / "folds.csv", dtype=str).set_index("file")
    for method in THREE:
        rows = table[table["method"] == method]
        assert sorted(rows["file"]) == files
        assert (rows["fold"].to_numpy() == folds.loc[rows["file"], "fold"].to_numpy()).all()
    assert {path.name for path in done.iterdir()} >= {*RESULTS, "protocol.json", "comparison.png"}


def test_the_numbers_of_the_table_are_those_of_the_predictions(done: Path) -> None:
    table = pd.read_csv(done / "table.csv").set_index("method")
    predictions = read_predictions(done / "predictions.csv")
    for method in THREE:
        rows = predictions[predictions["method"] == method]
        areas = [roc_auc_score(fold["label"] == "b", fold["prob_b"]) for _, fold in rows.groupby("fold")]
        assert table.loc[method, "auroc"] == pytest.approx(np.mean(areas))
        assert table.loc[method, "accuracy"] == pytest.approx((rows["prediction"] == rows["label"]).mean())
        assert table.loc[method, "brier"] == pytest.approx(np.mean((rows["prob_b"] - (rows["label"] == "b")) ** 2))
        assert table.loc[method, "auroc_low"] <= table.loc[method, "auroc"] <= table.loc[method, "auroc_high"]
        assert table.loc[method, ["trainings", "trained_parameters"]].tolist() == [3, 123]
    assert table["reference"].tolist() == [1, 0, 0]
    difference = table.loc["clam-sb", "auroc"] - table.loc["max", "auroc"]
    assert table.loc["clam-sb", "auroc_difference"] == pytest.approx(difference)
    assert 0.019 < table.loc["clam-sb", "p"] < 0.1
    assert table.loc["clam-sb", "p_holm"] == pytest.approx(2 * table.loc["clam-sb", "p"])
    assert table.loc["clam-sb", "delong_p"] < 0.05
    assert table.loc["max", ["p", "p_holm", "delong_p"]].isna().all()


def test_the_printed_tables_say_what_the_full_one_says(done: Path) -> None:
    table = pd.read_csv(done / "table.csv").set_index("method")
    lines = [line for line in (done / "table.md").read_text().splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert heads[:3] == ["method", "accuracy", "AUROC"]
    tex = (done / "table.tex").read_text()
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].replace(r"\textbf{", "").replace("}", "")
    tex_rows = [[cell.strip(" \\\n") for cell in line.split("&")] for line in body.strip().splitlines()]
    assert len(rows) == len(tex_rows) == 3
    for row, tex_row in zip(rows, tex_rows, strict=True):
        values = table.loc[row[0].removesuffix(" (reference)")]
        for cells in (row, tex_row):
            for column, metric in ((1, "accuracy"), (2, "auroc"), (4, "brier")):
                numbers = [float(text) for text in re.findall(r"\d\.\d{4}", cells[column])]
                expected = [values[metric], values[f"{metric}_low"], values[f"{metric}_high"]]
                assert numbers == pytest.approx(expected, abs=6e-5)
    best = max(rows, key=lambda row: float(re.findall(r"\d\.\d{4}", row[2])[0]))
    assert [row[2].startswith("**") for row in rows] == [row is best for row in rows]


def test_the_comma_separated_table_reads_back_in_full(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())
    with (done / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, found in zip(rows, results["rows"], strict=True):
        assert float(row["auroc"]) == found["figures"]["auroc"]["value"]
        assert float(row["brier_high"]) == found["figures"]["brier"]["high"]


def test_hashes_of_the_split_are_published(done: Path) -> None:
    table = pd.read_csv(done / "folds.csv", dtype=str)
    protocol = json.loads((done / "protocol.json").read_text())
    lines = sorted(
        json.dumps(list(row)) + "\n" for row in table[["file", "patient", "label", "fold"]].itertuples(index=False)
    )
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert protocol["facts"]["folds"]["sha256"] == expected
    assert expected in (done / "table.md").read_text()
    assert expected in (done / "table.tex").read_text()
    results = json.loads((done / "results.json").read_text())
    assert results["folds"] == protocol["facts"]["folds"]
    assert [part["files"] for part in results["folds"]["parts"]] == [10, 10, 10]
    assert results["protocol_sha256"] == hashlib.sha256((done / "protocol.json").read_bytes()).hexdigest()


def test_each_fold_is_tested_once_and_after_the_protocol(manifest: Path, tmp_path: Path) -> None:
    fake = Fake()  # it asserts that the protocol is there
    compare(config(manifest, tmp_path / "out", *THREE), worker=fake.work)
    expected = [(f"cells/{method}/fold-{fold}/seed-0", "test") for method in THREE for fold in range(3)]
    assert fake.scored == expected


def test_scores_without_a_protocol_are_refused(manifest: Path, tmp_path: Path) -> None:
    def forgetful(case: Any) -> Any:
        (case.cell.out / "protocol.json").unlink(missing_ok=True)
        return fake.work(case)

    fake = Fake()
    with pytest.raises(RunError, match="the protocol is missing or damaged"):
        compare(config(manifest, tmp_path / "out"), worker=forgetful)
    assert fake.scored == []
    record = json.loads((tmp_path / "out" / "cells/max/fold-0/seed-0.json").read_text())
    assert record["problems"][0][0] == "the protocol is missing or damaged"


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_comparison_that_was_stopped_goes_on_to_the_same_result(
    cut: int, manifest: Path, done: Path, tmp_path: Path
) -> None:
    asked = config(manifest, tmp_path / "out", *THREE)
    first, second = Fake(stop_after=cut), Fake()
    with pytest.raises(KeyboardInterrupt):
        compare(asked, worker=first.work)
    compare(asked, worker=second.work)
    assert len(first.trained) == cut
    assert sorted(first.trained + second.trained) == sorted(set(first.trained + second.trained))
    assert len(first.trained + second.trained) == 9
    assert_same(tmp_path / "out", done)


def test_the_same_comparison_twice_is_the_same(manifest: Path, done: Path, tmp_path: Path) -> None:
    compare(config(manifest, tmp_path / "out", *THREE), worker=Fake().work)
    assert_same(tmp_path / "out", done)


def test_a_finished_comparison_is_written_again_without_training(manifest: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    for run in out.glob("cells/*/*/seed-0"):
        shutil.rmtree(run)  # what was predicted stands beside
    before = {name: (out / name).read_bytes() for name in RESULTS}
    fake = Fake()
    compare(config(manifest, out, *THREE), worker=fake.work)
    assert fake.trained == []
    assert {name: (out / name).read_bytes() for name in RESULTS} == before


def work(asked: Any, barrier: Any) -> None:
    fake = Fake()
    barrier.wait()
    compare(asked, worker=fake.work)
    (asked.out / f"{multiprocessing.current_process().name}.trained").write_text("\n".join(fake.trained))


def test_two_processes_share_the_work(manifest: Path, done: Path, tmp_path: Path) -> None:
    asked = config(manifest, tmp_path / "out", *THREE)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=work, args=(asked, barrier), name=name) for name in ("one", "other")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    trained = [(tmp_path / "out" / f"{name}.trained").read_text().split("\n") for name in ("one", "other")]
    assert all(len(part) > 1 for part in trained)
    assert len(trained[0] + trained[1]) == 9
    assert_same(tmp_path / "out", done)


def test_shares_of_an_array_add_up(manifest: Path, done: Path, tmp_path: Path) -> None:
    fakes = [Fake(), Fake()]
    found: list[Comparison] = [
        compare(config(manifest, tmp_path / "out", *THREE, cells=f"{number}/2"), worker=fake.work)
        for number, fake in enumerate(fakes, start=1)
    ]
    assert [len(fake.trained) for fake in fakes] == [5, 4]
    assert [part.unfinished for part in found] == [4, 0]
    assert [bool(row.figures) for row in found[0].summary.rows] == [False, False, False]
    assert_same(tmp_path / "out", done)


def test_a_method_that_fails_is_told_and_leaves_the_others_going(manifest: Path, tmp_path: Path) -> None:
    asked = config(manifest, tmp_path / "out", *THREE)
    found = compare(asked, worker=Fake(broken="abmil").work)
    assert [str(cell) for cell, _ in found.failed] == [f"abmil, fold {fold}, seed 0" for fold in range(3)]
    assert str(found.failed[0][1].reasons[0]) == "it does not train (slide s1): mend it"
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("method")
    assert table["complete"].tolist() == [1, 0, 1]
    assert table.loc["abmil", ["accuracy", "auroc", "p"]].isna().all()
    assert table.loc["abmil", "reasons"].startswith("abmil, fold 0, seed 0: it does not train; abmil, fold 1")
    assert table.loc["clam-sb", "p_holm"] == pytest.approx(2 * table.loc["clam-sb", "p"])  # abmil is still to come
    assert "| abmil: incomplete | –" in (tmp_path / "out" / "table.md").read_text()
    told = "abmil is incomplete: abmil, fold 0, seed 0: it does not train (and 2 more)"
    assert told in (tmp_path / "out" / "table.md").read_text()
    assert set(read_predictions(tmp_path / "out" / "predictions.csv")["method"]) == {"max", "clam-sb"}
    again = compare(asked, worker=Fake().work)
    assert again.failed == ()
    assert all(row.figures for row in again.summary.rows)


def test_without_the_reference_nothing_is_tested(manifest: Path, tmp_path: Path) -> None:
    found = compare(config(manifest, tmp_path / "out", *THREE), worker=Fake(broken="max").work)
    assert [row.difference for row in found.summary.rows] == [None, None, None]
    assert [bool(row.figures) for row in found.summary.rows] == [False, True, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows[:-1], "1 of 10 files are not predicted, and 0 rows are too many"),
        (lambda rows: [*rows, rows[-1]], "0 of 10 files are not predicted, and 1 rows are too many"),
        (
            lambda rows: [*rows[:-1], re.sub(r",[ab],", ",c,", rows[-1], count=1)],
            "its slides, patients or labels are not",
        ),
        (lambda rows: [*rows[:-1], rows[-1].rsplit(",", 1)[0] + ","], "there are probabilities that are no numbers"),
        (
            lambda rows: [rows[0].replace("prob_a", "prob_c"), *rows[1:]],
            "columns prob_a, prob_c are lacking or too many",
        ),
    ],
)
def test_predictions_that_are_not_those_of_the_fold(
    change: Any, reason: str, manifest: Path, done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    path = out / "cells/abmil/fold-1/seed-0.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    row = compare(config(manifest, out, *THREE), worker=Fake().work).summary.rows[1]
    assert row.figures == {}
    assert row.reasons[0].startswith(f"abmil, fold 1, seed 0: {reason}")


def test_seeds_are_averaged_before_scoring(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(config(manifest, out, "max", "abmil", seeds=3, train={"seed": 5}), worker=Fake().work)
    by_seed = pd.read_csv(out / "predictions_by_seed.csv")
    assert by_seed.groupby("method")["seed"].unique().map(list).tolist() == [[5, 6, 7]] * 2
    averaged = read_predictions(out / "predictions.csv").set_index(["method", "file"])["prob_b"]
    expected = by_seed.groupby(["method", "file"])["prob_b"].mean()
    pd.testing.assert_series_equal(averaged.sort_index(), expected.sort_index())
    assert len(averaged) == 60
    assert pd.read_csv(out / "table.csv")["trainings"].tolist() == [9, 9]


def test_validation_alone_chooses_the_setting_and_the_test_fold_is_asked_once(manifest: Path, tmp_path: Path) -> None:
    fake, out = Fake(), tmp_path / "out"
    grid = {"all": [{"lr": 1e-4}, {"lr": 0.05}, {"lr": 1e-3}]}
    compare(config(manifest, out, "max", "abmil", grid=grid), worker=fake.work)
    tested = [run for run, split in fake.scored if split == "test"]
    assert tested == [f"cells/{method}/fold-{fold}/seed-0-point-1" for method in ("max", "abmil") for fold in range(3)]
    assert len([run for run, split in fake.scored if split == "valid"]) == 18
    record = json.loads((out / "cells/abmil/fold-2/seed-0.json").read_text())
    assert record["chosen"] == 1
    aurocs = [found["auroc"] for found in record["validation"]]
    assert aurocs[1] == max(aurocs) == 1.0
    assert "3 setting(s) a fold, chosen by validation auroc alone" in (out / "table.md").read_text()


def test_a_method_may_be_there_twice_by_names_of_its_own(manifest: Path, tmp_path: Path) -> None:
    fake, out = Fake(), tmp_path / "out"
    asked = config(manifest, out, "max", "sharp=max", overrides={"sharp": {"lr": 0.05}}, reference="sharp")
    rows = compare(asked, worker=fake.work).summary.rows
    assert [row.method for row in rows] == ["max", "sharp"]
    assert rows[1].figures["auroc"].value == 1.0 > rows[0].figures["auroc"].value
    assert {line.split()[0] for line in fake.trained} == {"max"}
    methods = json.loads((out / "protocol.json").read_text())["methods"]
    assert {name: plan["method"] for name, plan in methods.items()} == {"max": "max", "sharp": "max"}
    assert methods["sharp"]["options"]["lr"] == 0.05
    assert (out / "cells/sharp/fold-2/seed-0.csv").is_file()


def test_nested_folds_choose_by_the_mean_and_test_by_all_of_the_chosen(manifest: Path, tmp_path: Path) -> None:
    fake, out = Fake(), tmp_path / "out"
    grid = {"all": [{"lr": 1e-4}, {"lr": 0.05}]}
    compare(config(manifest, out, "max", folds=3, grid=grid, nested=True), worker=fake.work)
    validated = [run for run, split in fake.scored if split == "valid"]
    names = [f"seed-0-point-{point}-valid-{fold}" for point in (0, 1) for fold in (1, 2)]
    assert validated[:4] == [f"cells/max/fold-0/{name}" for name in names]
    tested = [run for run, split in fake.scored if split == "test"]
    chosen = {"fold-0": (1, 2), "fold-1": (2, 0), "fold-2": (0, 1)}
    assert tested == [f"cells/max/{fold}/seed-0-point-1-valid-{v}" for fold, both in chosen.items() for v in both]
    runs = [out / name / "predictions" for name in tested[:2]]
    one, other = (read_predictions(path / "test.csv").set_index("file")["prob_b"] for path in runs)
    found = read_predictions(out / "cells/max/fold-0/seed-0.csv").set_index("file")
    np.testing.assert_allclose(found["prob_b"], (one + other.loc[one.index]) / 2, rtol=1e-12)
    assert list(found["prediction"]) == ["ab"[int(value > 0.5)] for value in found["prob_b"]]
    record = json.loads((out / "cells/max/fold-0/seed-0.json").read_text())
    scores = [read_predictions(out / "cells/max/fold-0" / name / "predictions/valid.csv") for name in names[:2]]
    expected = np.mean([score(table, ("a", "b"), "patient", "auroc") for table in scores])
    assert record["validation"][0]["auroc"] == pytest.approx(expected)
    assert "each of the other folds validated in turn" in (out / "table.md").read_text()


def test_classes_and_slides_decide_whether_delong_is_there(tmp_path: Path) -> None:
    three = write_cohort(tmp_path / "three", classes="abc", count=45)
    found = compare(config(three, tmp_path / "out3", train={"unit": "file"}), worker=Fake().work)
    assert found.summary.rows[1].difference is not None
    assert found.summary.rows[1].delong is None
    assert "p (DeLong)" not in (tmp_path / "out3" / "table.md").read_text()
    twice = write_cohort(tmp_path / "twice", header=",slide", column=",slide{n}")
    text = twice.read_text()
    twice.write_text(
        re.sub(r"(s(\d+)\.png),p\d+,(\w),", lambda m: f"{m[1]},q{int(m[2]) // 4}{m[3]},{m[3]},{m[3]}", text)
    )
    found = compare(config(twice, tmp_path / "out2"), worker=Fake().work)
    assert (found.summary.files, found.summary.patients, found.summary.units) == (30, 16, 16)
    assert found.summary.rows[1].delong is None


def test_methods_cannot_be_told_apart_where_each_patient_stands_alone(tmp_path: Path) -> None:
    few = write_cohort(tmp_path / "few", count=6)
    found = compare(config(few, tmp_path / "out", *THREE), worker=Fake().work)
    assert "each patient is the only one of a fold and class" in found.summary.notes[0]
    for row in found.summary.rows[1:]:
        assert row.difference is not None
        assert (row.difference.low, row.difference.high, row.difference.p, row.p_holm) == (None, None, None, None)
        assert row.figures["accuracy"].low is None


def test_better_methods_are_found_to_be_better(done: Path) -> None:
    table = pd.read_csv(done / "table.csv").set_index("method")
    order = sorted(THREE, key=lambda method: SIGNAL[method])
    assert table["auroc"].sort_values().index.tolist() == order


def test_folds_of_the_manifest_are_taken_as_they_are(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "folds", count=24, header=",fold,site", column=",{n},x")
    text = manifest.read_text()
    manifest.write_text(re.sub(r",(\d+),x", lambda match: f",{int(match[1]) % 4},x", text))
    compare(config(manifest, tmp_path / "out", folds=None), worker=Fake().work)
    written = pd.read_csv(tmp_path / "out" / "folds.csv").set_index("file")["fold"]
    pd.testing.assert_series_equal(written, pd.read_csv(manifest).set_index("file")["fold"])
    with pytest.raises(CohortError, match=r"there are 4 folds \(--folds 3\)"):
        compare(config(manifest, tmp_path / "other", folds=3), worker=Fake().work)
    manifest.write_text(text.replace("p1,", "p0,").replace(",fold", ",fold"))
    with pytest.raises(CohortError, match=r"patient 'p0' is in fold|files labelled a and b"):
        compare(config(manifest, tmp_path / "other", folds=None), worker=Fake().work)
    manifest.write_text(re.sub(r",\d+,x", ",first,x", text))
    with pytest.raises(CohortError, match="'first' is no number of a fold"):
        compare(config(manifest, tmp_path / "other", folds=None), worker=Fake().work)
    assert not (tmp_path / "other" / "protocol.json").exists()


def test_a_class_that_a_fold_lacks_is_refused(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "folds", count=12, header=",fold", column=",{n}")
    text = re.sub(
        r",(\w),(\d+)$", lambda m: f",{m[1]},{int(m[2]) % 3 if m[1] == 'a' else 0}", manifest.read_text(), flags=re.M
    )
    manifest.write_text(text)
    with pytest.raises(CohortError, match=r"class 'b' has no test file \(testing on fold 1\)"):
        compare(config(manifest, tmp_path / "out", folds=None), worker=Fake().work)


def test_repeated_folds_test_every_file_once_in_each_draw(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = config(manifest, out, "max", "abmil", repeats=2)
    found = compare(asked, worker=Fake().work)
    predictions = read_predictions(out / "predictions.csv")
    assert predictions.groupby(["method", "file"]).size().eq(2).all()
    assert set(predictions["fold"]) == {str(number) for number in range(6)}
    draws = [pd.read_csv(out / name, dtype=str).set_index("file")["fold"] for name in ("folds.csv", "folds-2.csv")]
    assert set(draws[0]) == {"0", "1", "2"}
    assert set(draws[1]) == {"3", "4", "5"}
    assert (draws[0].astype(int) + 3 != draws[1].astype(int)).any()  # drawn anew
    options = json.loads((out / "cells/max/fold-5/seed-0/options.json").read_text())
    assert (options["fold"], Path(options["manifest"]).name) == (5, "folds-2.csv")
    abmil = predictions[predictions["method"] == "abmil"]
    areas = [roc_auc_score(rows["label"] == "b", rows["prob_b"]) for _, rows in abmil.groupby("fold")]
    assert found.summary.rows[1].figures["auroc"].value == pytest.approx(np.mean(areas))
    assert found.summary.rows[1].figures["accuracy"].value == pytest.approx(
        (abmil["label"] == abmil["prediction"]).mean()
    )
    assert (found.summary.files, found.summary.units, found.summary.patients) == (30, 30, 30)
    assert len(found.summary.rows[1].by_fold) == 6
    table = (out / "table.md").read_text()
    assert "Folds were drawn 2 times, and figures are over all draws" in table
    assert "No test by DeLong: it is for one draw of folds" in table
    fake = Fake()
    compare(asked, worker=fake.work)
    assert fake.trained == []
    with pytest.raises(RunError, match="folds were drawn 2 times, and are now asked for 1 times"):
        compare(config(manifest, out, "max", "abmil"), worker=fake.work)


def test_patients_count_the_same_in_all_draws() -> None:
    units = pd.DataFrame(
        {
            "patient": [f"p{number}" for number in range(8)] * 2,
            "label": ["a", "b"] * 8,
            "fold": ["0"] * 4 + ["1"] * 4 + ["2"] * 2 + ["3"] * 4 + ["2"] * 2,
            "draw": [1] * 8 + [2] * 8,
        }
    )
    patient_of_unit, strata = fold_strata(units)
    assert patient_of_unit.tolist() == [*range(8)] * 2
    assert sorted(stratum.tolist() for stratum in strata) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1], size=16)
    found = bootstrap(units, {"m": probabilities}, "ab", resamples=50, seed=1)["m"]
    weights = next(patient_counts(strata, 50, np.random.default_rng(1), units=16, rescaled=True))[:, patient_of_unit]
    for drawn, counts in zip(found.drawn["auroc"], weights, strict=True):
        areas = []
        for fold in "0123":
            rows = (units["fold"] == fold).to_numpy() & (counts > 0)
            truth = (units["label"] == "b").to_numpy()[rows]
            if 0 < truth.sum() < len(truth):
                areas.append(roc_auc_score(truth, probabilities[rows, 1], sample_weight=counts[rows]))
        assert drawn == pytest.approx(np.mean(areas))


def test_folds_of_the_manifest_cannot_be_drawn_again(tmp_path: Path) -> None:
    manifest = write_cohort(tmp_path / "cohort", header=",fold", column=",{n}")
    table = pd.read_csv(manifest)
    table.assign(fold=[number // 2 % 3 for number in range(len(table))]).to_csv(manifest, index=False)
    with pytest.raises(CohortError, match=r"the manifest has folds of its own \(--repeats 2\)"):
        compare(config(manifest, tmp_path / "out", repeats=2, folds=None), worker=Fake().work)
