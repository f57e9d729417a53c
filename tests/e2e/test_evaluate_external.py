"""A run scored on another cohort: its files and numbers, and what stands in the way of an honest score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from train_tiny import make_cohort, tiny_config

from wholeslide.cli import main
from wholeslide.errors import CohortError, ConfigError, RunError
from wholeslide.metrics import evaluate
from wholeslide.predict import evaluate_external, predict
from wholeslide.slides.lock import alone_on
from wholeslide.train.loop import train

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.fixture(scope="module")
def run(manifest: Path, tmp_path_factory: pytest.TempPathFactory, arithmetic: None) -> Path:
    return train(tiny_config(manifest, tmp_path_factory.mktemp("runs") / "run")).path


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Four slides of four patients of another hospital; the manifest's column of splits means nothing here."""
    manifest = make_cohort(tmp_path / "others", train=4, valid=0, test=0, seed=7)
    manifest.write_text(manifest.read_text().replace("patient", "other").replace("file,other", "file,patient"))
    return manifest


def test_another_cohort_is_scored_as_a_split_is(run: Path, others: Path) -> None:
    found = evaluate_external(run, others, others.parent, name="hospital-b")
    assert (found["split"], found["n"]) == ("external-hospital-b", 4)
    table = pd.read_csv(run / "predictions" / "external-hospital-b.csv")
    assert list(table["file"]) == [f"slide{number}.png" for number in range(4)]
    expected = evaluate(table, classes=("a", "b"), unit="patient")
    stored = json.loads((run / "metrics" / "external-hospital-b.json").read_text())
    assert {name: stored[name] for name in expected} == expected
    assert [stage["stage"] for stage in stored["stages"]] == [1, 2]
    rows = predict(run, [others.parent / name for name in table["file"]]).rows
    pd.testing.assert_frame_equal(rows[["prob_a", "prob_b"]], table[["prob_a", "prob_b"]], atol=1e-6)
    for suffix in ("_slides", "_patients", "_by_stage"):
        assert (run / "predictions" / f"external-hospital-b{suffix}.csv").is_file()


def test_the_command_names_it_after_its_manifest(run: Path, others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--manifest", str(others), "--slides", str(others.parent), "--quiet"]) == 0
    assert "external-labels: 4 patients" in capsys.readouterr().out
    assert (run / "metrics" / "external-labels.json").is_file()
    assert main(["evaluate", str(run), "--manifest", str(others), "--split", "test"]) == 2
    error = capsys.readouterr().err
    assert "two cohorts (--manifest and --split): give one of the two" in error
    assert "no folder of slides (--manifest): give the other cohort's with --slides" in error


def test_a_second_one_of_the_same_name_is_refused(run: Path, others: Path) -> None:
    numbers = run / "metrics" / "external-b.json"
    with alone_on(numbers):
        with pytest.raises(RunError, match=r"is writing this file \(.*external-b\.json\): wait until it has ended$"):
            evaluate_external(run, others, others.parent, name="b")
        evaluate_external(run, others, others.parent, name="c", decoders="threads")


def test_what_the_run_has_seen_is_refused_all_together(run: Path, manifest: Path, others: Path) -> None:
    shutil.copy(manifest.parent / "slide1.png", others.parent / "renamed.png")  # a training slide
    shutil.copy(manifest.parent / "slide8.png", others.parent / "tested.png")  # a test slide may be scored
    with others.open("a") as stream:
        stream.write("renamed.png,other8,b,train\ntested.png,other9,a,train\n")
    others.write_text(others.read_text().replace("other0", "patient5"))
    with pytest.raises(CohortError) as refused:
        evaluate_external(run, others, others.parent)
    told = [problem.what for problem in refused.value.problems]
    assert sorted(told) == [
        "patient 'patient5' is in the run's valid split",
        "the same content as slide1.png, which the run has seen",
    ]


def test_labels_that_the_run_does_not_know_are_refused(run: Path, others: Path) -> None:
    others.write_text(others.read_text().replace(",b,", ",c,"))
    with pytest.raises(CohortError, match="c"):
        evaluate_external(run, others, others.parent)


def test_one_class_alone_has_no_area_and_it_says_why(run: Path, others: Path) -> None:
    others.write_text("\n".join(line for line in others.read_text().splitlines() if ",b," not in line) + "\n")
    found = evaluate_external(run, others, others.parent, name="one")
    assert found["auroc"]["value"] is None
    assert found["auroc"]["reason"] == "no b in this split"
    assert found["accuracy"]["value"] is not None


def test_a_name_is_one_for_files(run: Path, others: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a name for files \(--name \.\./x\)"):
        evaluate_external(run, others, others.parent, name="../x")
