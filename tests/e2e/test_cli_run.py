"""From a folder of pictures and a CSV to numbers and predictions, by the command line alone."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import train_tiny  # noqa: F401  registers the backbone resnet_micro
import yaml
from cli_cases import (
    TINY_TRAINING,
    call,
    child_words,
    cohort,
    manifest,
    picture,
    predicted,
    refused,
    tiff,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wholeslide.slides import opening
from wholeslide.slides.lock import alone_in, alone_on
from wholeslide.slides.workers import Workers

PREDICTED = ["file", "slide", "patient", "prediction", "prob_a", "prob_b", "error"]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Whether slides have been read by processes of their own in this test; the run itself reads PNG in threads."""
    pool = Workers(1)
    monkeypatch.setattr(opening, "decoding_processes", lambda: pool)
    yield lambda: pool._idle.queue[0] is not None
    pool.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, with a run in ``run``."""
    folder = tmp_path_factory.mktemp("cohort")
    words = ["--slides", folder, "--out", folder / "run", *TINY_TRAINING, "--mpp", "native", "--epochs", 2]
    outcome = call("train", cohort(folder, 20), *words)
    assert outcome.status == 0, outcome
    assert outcome.out == f"The run is in {folder / 'run'}. Next: wholeslide evaluate {folder / 'run'}\n"
    return folder


def test_the_run_s_config_begins_the_same_run_again(folder: Path, tmp_path: Path) -> None:
    stored = folder / "run" / "config.yaml"
    assert yaml.safe_load(stored.read_text())["epochs"] == 2
    outcome = call("train", "--config", stored, "--out", tmp_path / "again", "--dry-run")
    assert outcome.status == 0, outcome
    assert "20 files of 20 slides of 20 patients" in outcome.out
    assert not (tmp_path / "again").exists()


def test_two_runs_agree_bit_by_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path
) -> None:
    """The second run computes in the way that the first one's timing chose."""
    assert list(cache_home.rglob("execution-*.json"))
    monkeypatch.setattr("wholeslide.streaming.timings.choose_execution", lambda *args: pytest.fail("timed again"))
    words = ["--slides", folder, "--out", tmp_path / "run", *TINY_TRAINING, "--mpp", "native", "--epochs", 2]
    assert call("train", folder / "labels.csv", *words).status == 0
    for name in ("checkpoints/last.json", "checkpoints/best.json"):
        one, other = (json.loads((run / name).read_text()) for run in (folder / "run", tmp_path / "run"))
        assert one["sha256"] == other["sha256"]
    assert (tmp_path / "run" / "plan.json").read_text() == (folder / "run" / "plan.json").read_text()


def test_dry_run_says_time_memory_and_disk(folder: Path, tmp_path: Path) -> None:
    words = ["--slides", folder, "--out", tmp_path / "run", *TINY_TRAINING, "--mpp", "native", "--dry-run"]
    outcome = call("train", folder / "labels.csv", *words)
    assert outcome.status == 0
    for word in ("time: ", "memory: ", "disk: "):
        assert word in outcome.out
    assert list(tmp_path.iterdir()) == []


class TestEvaluate:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def output(cls, folder: Path) -> str:
        outcome = call("evaluate", folder / "run", "--quiet")
        assert outcome.status == 0, outcome
        return outcome.out

    def test_tables(self, output: str) -> None:
        for word in ("auroc", "95% interval", "balanced accuracy", "Each stage's own classifier", "Confusion"):
            assert word in output

    def test_files_of_predictions(self, folder: Path) -> None:
        predictions = folder / "run" / "predictions"
        files = pd.read_csv(predictions / "test.csv")
        assert list(files.columns) == ["file", "slide", "patient", "label", "prediction", "prob_a", "prob_b"]
        split = pd.read_csv(folder / "run" / "cohort.csv")
        assert sorted(files["file"]) == sorted(split[split["split"] == "test"]["file"])
        assert (files["prob_a"] + files["prob_b"]).sub(1).abs().max() < 1e-6
        stages = pd.read_csv(predictions / "test_by_stage.csv")
        assert sorted(set(stages["stage"])) == [1, 2]
        last = stages[stages["stage"] == 2].drop(columns="stage").reset_index(drop=True)
        pd.testing.assert_frame_equal(last, files)
        assert list(pd.read_csv(predictions / "test_slides.csv")["slide"]) == list(files["slide"])
        assert list(pd.read_csv(predictions / "test_patients.csv")["patient"]) == list(files["patient"])

    def test_numbers(self, folder: Path) -> None:
        found = json.loads((folder / "run" / "metrics" / "test.json").read_text())
        files = pd.read_csv(folder / "run" / "predictions" / "test.csv")
        accuracy = (files["label"] == files["prediction"]).mean()
        assert (found["unit"], found["n"], found["split"]) == ("patient", len(files), "test")
        assert found["accuracy"]["value"] == pytest.approx(accuracy)
        assert found["accuracy"]["low"] <= accuracy <= found["accuracy"]["high"]
        assert [entry["stage"] for entry in found["stages"]] == [1, 2]
        assert found["stages"][1]["auroc"] == found["auroc"]

    def test_is_the_same_again_and_with_little_memory(self, folder: Path) -> None:
        before = (folder / "run" / "predictions" / "test.csv").read_text()
        outcome = call("evaluate", folder / "run", "--json", "--quiet")
        assert outcome.status == 0
        assert json.loads(outcome.out) == json.loads((folder / "run" / "metrics" / "test.json").read_text())
        assert (folder / "run" / "predictions" / "test.csv").read_text() == before
        assert call("evaluate", folder / "run", "--memory", "1.5GiB", "--quiet").status == 0
        again = pd.read_csv(folder / "run" / "predictions" / "test.csv")
        assert (again["prob_a"] - pd.read_csv(io.StringIO(before))["prob_a"]).abs().max() < 1e-5

    def test_agrees_with_the_validation_while_training(self, folder: Path) -> None:
        assert call("evaluate", folder / "run", "--split", "valid", "--quiet").status == 0
        assert (folder / "run" / "metrics" / "valid.json").exists()

    def test_slides_that_were_moved(self, folder: Path, tmp_path: Path) -> None:
        for path in folder.glob("*.png"):
            (tmp_path / path.name).symlink_to(path)
        assert call("evaluate", folder / "run", "--slides", tmp_path, "--quiet").status == 0

    def test_is_read_by_the_decoders_that_are_asked_for(self, folder: Path, apart: Callable[[], bool]) -> None:
        before = (folder / "run" / "predictions" / "test.csv").read_text()
        assert call("evaluate", folder / "run", "--quiet").status == 0
        assert not apart()
        assert call("evaluate", folder / "run", "--decoders", "processes", "--quiet").status == 0
        assert apart()
        assert (folder / "run" / "predictions" / "test.csv").read_text() == before

    def test_a_second_one_at_the_same_files_is_refused(self, folder: Path) -> None:
        numbers = folder / "run" / "metrics" / "test.json"
        with alone_on(numbers):
            assert refused("evaluate", folder / "run", "--quiet") == [
                f"another process is writing this file ({numbers}): wait until it has ended"
            ]
            assert call("evaluate", folder / "run", "--split", "valid", "--quiet").status == 0
        assert call("evaluate", folder / "run", "--quiet").status == 0
        assert not list(numbers.parent.glob("*.lock"))

    def test_goes_on_beside_a_training(self, folder: Path) -> None:
        with alone_in(folder / "run"):
            assert call("evaluate", folder / "run", "--quiet").status == 0

    def test_an_unknown_split(self, folder: Path) -> None:
        assert refused("evaluate", folder / "run", "--split", "tset") == [
            "tset is not a value it takes (--split): give one of test, valid, train"
        ]


class TestPredict:
    def test_equals_the_evaluation(self, folder: Path, tmp_path: Path) -> None:
        assert call("evaluate", folder / "run", "--quiet").status == 0
        evaluated = pd.read_csv(folder / "run" / "predictions" / "test.csv").set_index("slide")
        outcome = call("predict", folder / "run", folder, "--out", tmp_path / "new.csv", "--quiet")
        assert outcome.status == 0, outcome
        assert outcome.out == f"20 slides predicted, 0 could not be read: {tmp_path / 'new.csv'}\n"
        table = predicted(tmp_path / "new.csv").set_index("slide").loc[evaluated.index]
        pd.testing.assert_series_equal(table["prob_a"].astype(float), evaluated["prob_a"])
        assert list(table["prediction"]) == list(evaluated["prediction"])

    def test_in_integers_with_ranges_that_are_found_once(self, folder: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(folder / "run", run)
        words = ["predict", run, folder / "s0.png", folder / "s1.png", "--quiet", "--out"]
        assert call(*words, tmp_path / "floats.csv", "--precision", "fp32").status == 0
        assert not (run / "calibration.safetensors").exists()
        assert call(*words, tmp_path / "integers.csv", "--precision", "int8").status == 0
        floats, integers = predicted(tmp_path / "floats.csv"), predicted(tmp_path / "integers.csv")
        difference = (floats["prob_a"].astype(float) - integers["prob_a"].astype(float)).abs()
        assert 0 < difference.max() < 0.05
        made = (run / "calibration.safetensors").stat().st_mtime_ns
        assert call(*words, tmp_path / "again.csv", "--precision", "int8").status == 0
        assert (tmp_path / "again.csv").read_text() == (tmp_path / "integers.csv").read_text()
        assert (run / "calibration.safetensors").stat().st_mtime_ns == made
        assert refused(*words, tmp_path / "floats.csv", "--precision", "int8", "--resume") == [
            f"the predictions in this file were made with --precision fp32, not int8 ({tmp_path / 'floats.csv'}): "
            "go on with the options that it was begun with, or give another --out"
        ]
        kept = run / "calibration.safetensors"
        ranges, metadata = load_file(kept), safe_open(kept, framework="pt").metadata()
        save_file({name: found * 1.5 for name, found in ranges.items()}, kept, metadata)
        assert refused(*words, tmp_path / "integers.csv", "--precision", "int8", "--resume") == [
            f"the predictions in this file were made with other ranges of 8-bit numbers ({tmp_path / 'integers.csv'}): "
            "put back the run's calibration.safetensors, or give another --out"
        ]

    def test_integers_need_training_slides_once(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder / "run", tmp_path / "run")
        config = tmp_path / "run" / "config.yaml"
        config.write_text(config.read_text().replace(f"slides: {folder}", f"slides: {tmp_path / 'elsewhere'}"))
        (tmp_path / "elsewhere").mkdir()
        lines = refused("predict", tmp_path / "run", folder / "s0.png", "--precision", "int8", "--quiet")
        assert lines[0] == (
            "the ranges of 8-bit numbers are found on training slides, which cannot be read "
            f"({tmp_path / 'run'}): run `wholeslide predict --precision int8` once where they are; the ranges are then "
            "kept in the run"
        )

    def test_what_is_passed_over_in_a_folder_is_told(self, folder: Path, tmp_path: Path) -> None:
        picture(tmp_path / "new" / "a.png")
        for name in ("list.csv", "b.svs.gz", "deep/c.isyntax", "deep/d.isyntax", "README"):
            (tmp_path / "new" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "new" / name).write_text("x")
        outcome = call("predict", folder / "run", tmp_path / "new", "--quiet")
        assert outcome.status == 0
        assert outcome.err == [
            f"{tmp_path / 'new'}: 5 files of other kinds are passed over "
            "(1 without an ending, 1 .csv, 1 .gz, 2 .isyntax)"
        ]
        assert call("predict", folder / "run", tmp_path / "new" / "a.png", "--quiet").err == []

    def test_scales_that_differ_are_told(self, folder: Path, tmp_path: Path) -> None:
        for name, mpp in (("a", 0.25), ("b", 0.26), ("c", 1.0), ("d", None)):
            tiff(tmp_path / f"{name}.tiff", mpp=mpp, width=300)
        words = ["predict", folder / "run", *(tmp_path / f"{name}.tiff" for name in "abcd"), "--quiet"]
        outcome = call(*words)
        assert outcome.status == 0, outcome
        assert outcome.warnings == [
            f"slides differ 4.0-fold in scale, from 0.25 µm per pixel ({tmp_path / 'a.tiff'}) to 1 "
            f"({tmp_path / 'c.tiff'}): only slides of the scale that was trained on are judged as in training",
            "1 of 4 slides have no scale, and the others have",
        ]
        assert call(*words, "--mpp-override", 0.5).warnings == []

    def test_rows_on_stdout(self, folder: Path) -> None:
        outcome = call("predict", folder / "run", folder / "s0.png", folder / "s1.png", "--quiet")
        rows = list(csv.DictReader(io.StringIO(outcome.out)))
        assert [row["file"] for row in rows] == [str(folder / "s0.png"), str(folder / "s1.png")]
        assert list(rows[0]) == PREDICTED

    def test_a_manifest_without_labels(self, folder: Path, tmp_path: Path) -> None:
        path = manifest(tmp_path, ["s1.png,p7", "s0.png,p7"], "file,patient")
        words = ["--slides", folder, "--out", tmp_path / "new.csv", "--quiet"]
        assert call("predict", folder / "run", path, *words).status == 0
        table = predicted(tmp_path / "new.csv")
        assert list(table["file"]) == ["s1.png", "s0.png"]
        assert list(table["patient"]) == ["p7", "p7"]

    def test_what_cannot_be_read_has_a_row_a_line_and_status_2(self, folder: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken 😐.png"
        broken.write_bytes(b"no picture")
        slides = [folder / "s0.png", broken, tmp_path / "nowhere.svs", folder / "s1.png"]
        outcome = call("predict", folder / "run", *slides, "--out", tmp_path / "new.csv", "--quiet")
        assert outcome.status == 2
        assert len(outcome.errors) == 2
        table = predicted(tmp_path / "new.csv").set_index("file")
        assert set(table.index) == {str(slide) for slide in slides}
        assert list(table.loc[[str(slides[0]), str(slides[3])], "error"]) == ["", ""]
        for slide in slides[1:3]:
            assert table.loc[str(slide), "error"] in outcome.errors
            assert table.loc[str(slide), "prediction"] == ""

    def test_resume_skips_what_is_done_and_tries_errors_again(self, folder: Path, tmp_path: Path) -> None:
        slide, out = tmp_path / "late.png", tmp_path / "new.csv"
        slide.write_bytes(b"not yet")
        words = ["predict", folder / "run", folder / "s0.png", slide, "--out", out, "--quiet"]
        assert call(*words).status == 2
        first = predicted(out)
        assert refused(*words) == [f"the file exists ({out}): add --resume to go on with it, or give another --out"]
        picture(slide)
        outcome = call(*words, folder / "s1.png", "--resume")
        assert outcome.status == 0, outcome
        assert outcome.out == f"2 slides predicted, 1 before, 0 could not be read: {out}\n"
        table = predicted(out)
        assert list(table["file"]) == [str(folder / "s0.png"), str(slide), str(folder / "s1.png")]
        assert list(table["error"]) == ["", "", ""]
        assert table["prob_a"][0] == float(first["prob_a"][0])

    def test_resume_goes_on_with_other_decoders(self, folder: Path, tmp_path: Path, apart: Callable[[], bool]) -> None:
        out, whole = tmp_path / "new.csv", tmp_path / "whole.csv"
        assert call("predict", folder / "run", folder / "s0.png", "--out", out, "--quiet").status == 0
        assert not apart()
        slides = [folder / "s0.png", folder / "s1.png"]
        outcome = call(
            "predict", folder / "run", *slides, "--out", out, "--decoders", "processes", "--resume", "--quiet"
        )
        assert outcome.out == f"1 slides predicted, 1 before, 0 could not be read: {out}\n"
        assert apart()
        assert call("predict", folder / "run", *slides, "--out", whole, "--quiet").status == 0
        assert out.read_bytes() == whole.read_bytes()

    def test_resume_tells_slides_of_one_name_apart(self, folder: Path, tmp_path: Path) -> None:
        lists = []
        for index, site in enumerate(("rome", "oslo")):
            picture(tmp_path / site / "a.png", 260 + index, seed=index)
            lists.append(manifest(tmp_path / site, ["a.png"], "file"))
        out = tmp_path / "new.csv"
        words = ["predict", folder / "run", "--out", out, "--resume", "--quiet"]
        assert call(*words, lists[0]).status == 0
        outcome = call(*words, lists[1])
        assert outcome.status == 0, outcome
        assert outcome.out == f"1 slides predicted, 0 could not be read: {out}\n"
        assert list(predicted(out)["file"]) == ["a.png", str(tmp_path / "oslo" / "a.png")]
        assert call(*words, *lists).out == f"0 slides predicted, 2 before, 0 could not be read: {out}\n"
        assert len(predicted(out)) == 2

    def test_resume_refuses_what_another_checkpoint_or_other_options_made(self, folder: Path, tmp_path: Path) -> None:
        out, other = tmp_path / "new.csv", tmp_path / "run"
        training = [*TINY_TRAINING, "--seed", 1, "--mpp", "native", "--epochs", 1]
        assert call("train", folder / "labels.csv", "--slides", folder, "--out", other, *training).status == 0
        assert call("predict", folder / "run", folder / "s0.png", "--out", out, "--quiet").status == 0
        before = out.read_bytes()
        words = [folder / "s0.png", folder / "s1.png", "--out", out, "--resume", "--quiet"]
        assert refused("predict", other, *words) == [
            f"the predictions in this file were made with another checkpoint ({out}): "
            "give the run that made them, as it was then, or another --out"
        ]
        assert refused("predict", folder / "run", *words, "--mpp-override", 0.5) == [
            f"the predictions in this file were made with --mpp-override None, not 0.5 ({out}): "
            "go on with the options that it was begun with, or give another --out"
        ]
        (tmp_path / "new.csv.made-with.json").unlink()
        assert refused("predict", folder / "run", *words) == [
            f"nothing tells what the predictions in this file were made with ({out}): "
            "put new.csv.made-with.json back beside it, or give another --out"
        ]
        assert out.read_bytes() == before

    def test_is_killed_between_whole_rows(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "new.csv"
        child = subprocess.Popen(child_words("predict", folder / "run", folder, "--out", out))
        wait_for_rows(child, out, 3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert 3 <= len(predicted(out)) < 20
        outcome = call("predict", folder / "run", folder, "--out", out, "--resume", "--quiet")
        assert outcome.status == 0
        assert sorted(predicted(out)["file"]) == sorted(str(path) for path in folder.glob("*.png"))

    def test_terminated(self, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "new.csv"
        words = child_words("predict", folder / "run", folder, "--out", out)
        child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        wait_for_rows(child, out, 1)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=120)
        assert child.returncode == 143, err
        assert "Traceback" not in err
        assert len(predicted(out)) < 20


def wait_for_rows(child: subprocess.Popen[str] | subprocess.Popen[bytes], out: Path, count: int) -> None:
    while child.poll() is None and not (out.exists() and len(predicted(out)) >= count):
        time.sleep(0.005)


def test_a_folder_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        errors = refused("predict", folder / "run", folder / "s0.png", "--out", tmp_path / "new.csv", "--quiet")
    finally:
        tmp_path.chmod(0o700)
    assert errors[0].startswith("cannot be written: Permission denied (")
