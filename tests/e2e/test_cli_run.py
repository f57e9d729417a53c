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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import train_tiny  # noqa: F401  registers the backbone resnet_tiny
import yaml
from cli_cases import TINY_TRAINING, Outcome, call, child_words, cohort, manifest, picture, real_data, refused, tiff
from PIL import Image

from wholeslide.cli import load
from wholeslide.cli.parser import parse

CLASSES = ["a", "b"]
PREDICTED = ["file", "slide", "patient", "prediction", "prob_a", "prob_b", "error"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, with a run in ``run``."""
    folder = tmp_path_factory.mktemp("cohort")
    words = ["--slides", folder, "--out", folder / "run", *TINY_TRAINING, "--mpp", "native", "--epochs", 2]
    outcome = call("train", cohort(folder, 20), *words)
    assert outcome.status == 0, outcome
    assert outcome.out == f"The run is in {folder / 'run'}. Next: wholeslide evaluate {folder / 'run'}\n"
    return folder


def predicted(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table.columns) == PREDICTED
    return table


def test_the_run_s_config_begins_the_same_run_again(folder: Path, tmp_path: Path) -> None:
    stored = folder / "run" / "config.yaml"
    assert yaml.safe_load(stored.read_text())["epochs"] == 2
    outcome = call("train", "--config", stored, "--out", tmp_path / "again", "--dry-run")
    assert outcome.status == 0, outcome
    assert "20 files of 20 slides of 20 patients" in outcome.out
    assert not (tmp_path / "again").exists()


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
        assert call("evaluate", folder / "run", "--memory", "1GiB", "--quiet").status == 0
        again = pd.read_csv(folder / "run" / "predictions" / "test.csv")
        assert (again["prob_a"] - pd.read_csv(io.StringIO(before))["prob_a"]).abs().max() < 1e-5

    def test_agrees_with_the_validation_while_training(self, folder: Path) -> None:
        assert call("evaluate", folder / "run", "--split", "valid", "--quiet").status == 0
        assert (folder / "run" / "metrics" / "valid.json").exists()

    def test_slides_that_were_moved(self, folder: Path, tmp_path: Path) -> None:
        for path in folder.glob("*.png"):
            (tmp_path / path.name).symlink_to(path)
        assert call("evaluate", folder / "run", "--slides", tmp_path, "--quiet").status == 0

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


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on slides with a scale, at 2 µm/px."""
    folder = tmp_path_factory.mktemp("scaled")
    rows = []
    for index in range(20):
        tiff(folder / f"s{index}.tiff", mpp=2.0, width=400 + index)
        rows.append(f"s{index}.tiff,{'ab'[index % 2]}")
    words = ["--slides", folder, "--out", folder / "run", *TINY_TRAINING, "--epochs", 1]
    outcome = call("train", manifest(folder, rows), *words)
    assert outcome.status == 0, outcome
    return folder


def test_mpp_override(scaled: Path, tmp_path: Path) -> None:
    image = Image.open(tiff(tmp_path / "a.tiff", mpp=2.0))
    image.save(tmp_path / "a.png")
    outcome = call("predict", scaled / "run", tmp_path / "a.png", "--quiet")
    assert outcome.status == 2
    assert "no usable scale" in outcome.errors[0]
    outcome = call("predict", scaled / "run", tmp_path / "a.png", "--mpp-override", "2", "--quiet")
    assert outcome.status == 0, outcome
    assert refused("predict", scaled / "run", tmp_path / "a.png", "--mpp-override", "500")[0].startswith("not a scale")


def test_real_slides_and_the_unreadable_ones(scaled: Path, tmp_path: Path) -> None:
    slides = real_data() / "slides"
    good = [slides / name for name in ("cmu_small_region.svs", "fluorescence-dapi.ndpi", "dicom-wsi.dcm")]
    bad = [slides / "openslide-fixtures" / name for name in ("unopenable.tiff", "unreadable.svs")]
    outcome = call("predict", scaled / "run", bad[0], *good, bad[1], "--out", tmp_path / "new.csv", "--quiet")
    assert outcome.status == 2
    assert len(outcome.errors) == 2
    table = predicted(tmp_path / "new.csv").set_index("file")
    assert len(table) == 5
    for path in good:
        assert table.loc[str(path), "prediction"] in CLASSES
        assert table.loc[str(path), "error"] == ""
    for path in bad:
        assert table.loc[str(path), "prediction"] == ""
        assert str(path) in table.loc[str(path), "error"]
        assert any(str(path) in line for line in outcome.errors)


class TestSplitAndInspect:
    def test_split(self, folder: Path, tmp_path: Path) -> None:
        outcome = call("split", folder / "labels.csv", "--out", tmp_path / "split.csv", "--fractions", "0.5,0.25,0.25")
        assert outcome.status == 0
        table = pd.read_csv(tmp_path / "split.csv")
        assert table["split"].value_counts().to_dict() == {"train": 10, "valid": 5, "test": 5}
        assert str(tmp_path / "split.csv") in outcome.out
        again = call("split", folder / "labels.csv", "--out", tmp_path / "again.csv", "--fractions", "0.5,0.25,0.25")
        assert again.status == 0
        assert (tmp_path / "again.csv").read_text() == (tmp_path / "split.csv").read_text()

    def test_folds(self, folder: Path, tmp_path: Path) -> None:
        assert call("split", folder / "labels.csv", "--out", tmp_path / "folds.csv", "--folds", 5).status == 0
        assert pd.read_csv(tmp_path / "folds.csv")["fold"].value_counts().to_dict() == dict.fromkeys(range(5), 4)

    def test_the_manifest_is_not_overwritten(self, folder: Path) -> None:
        path = folder / "labels.csv"
        assert refused("split", path, "--out", path) == [
            f"this would overwrite the manifest (--out {path}): give another file"
        ]

    def test_fractions_that_are_no_split(self, folder: Path, tmp_path: Path) -> None:
        words = ["split", folder / "labels.csv", "--out", tmp_path / "x.csv", "--fractions", "0.5,0.5,0.5"]
        assert refused(*words)[0].startswith("not a split (--fractions 0.5,0.5,0.5): ")

    def test_inspect(self, tmp_path: Path) -> None:
        path = tiff(tmp_path / "a.tiff", mpp=1.0)
        outcome = call("inspect", path, "--json", "--overlay", tmp_path / "pictures")
        assert outcome.status == 0, outcome
        (found,) = json.loads(outcome.out)
        assert list(found) == [
            *("file", "vendor", "width", "height", "levels", "mpp_x", "mpp_y"),
            *("tissue_fraction", "working_width", "working_height", "working_mpp"),
        ]
        assert (found["file"], found["width"], found["mpp_x"]) == (str(path), 512, pytest.approx(1.0))
        assert [picture.name for picture in (tmp_path / "pictures").iterdir()] == ["a.png"]
        assert "512x512" in call("inspect", path).out

    def test_inspect_goes_on_after_a_slide_that_cannot_be_read(self, tmp_path: Path) -> None:
        outcome = call("inspect", tmp_path / "nowhere.svs", tiff(tmp_path / "a.tiff", mpp=1.0), "--json")
        assert outcome.status == 2
        assert len(json.loads(outcome.out)) == 1
        assert outcome.errors == [f"no such file ({tmp_path / 'nowhere.svs'}): check the name and the --slides folder"]


class TestPrepare:
    def test_predictions_from_prepared_slides_are_the_same(self, scaled: Path, tmp_path: Path) -> None:
        words = ["--slides", scaled, "--out", tmp_path / "cache", "--lossless", "--quiet"]
        outcome = call("prepare", scaled / "labels.csv", *words)
        assert outcome.status == 0, outcome
        assert outcome.out.startswith("20 slides to prepare: about ")
        assert "\n20 slides prepared (" in outcome.out
        assert len(list((tmp_path / "cache").iterdir())) == 20
        again = call("prepare", scaled / "labels.csv", *words)
        assert again.out.startswith("0 slides prepared (0 bytes), 20 were there before: ")
        one = call("predict", scaled / "run", scaled / "s0.tiff", "--quiet")
        other = call("predict", scaled / "run", *(tmp_path / "cache").glob("s0.*"), "--quiet")
        (expected,), (found,) = (list(csv.DictReader(io.StringIO(text))) for text in (one.out, other.out))
        assert float(found["prob_a"]) == pytest.approx(float(expected["prob_a"]), abs=1e-6)

    def test_the_others_are_prepared_where_one_cannot_be_read(self, tmp_path: Path) -> None:
        tiff(tmp_path / "a.tiff", mpp=2.0)
        (tmp_path / "b.tiff").write_bytes(b"no slide")
        path = manifest(tmp_path, ["b.tiff", "a.tiff"], "file")
        errors = refused("prepare", path, "--slides", tmp_path, "--out", tmp_path / "cache", "--quiet")
        assert len(errors) == 1
        assert str(tmp_path / "b.tiff") in errors[0]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_not_enough_space(self, scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
        errors = refused("prepare", scaled / "labels.csv", "--slides", scaled, "--out", tmp_path / "cache", "--quiet")
        assert errors[0].startswith("the disk is too full: about ")
        assert "1000 bytes are free" in errors[0]
        assert not (tmp_path / "cache").exists()


class TestVerify:
    WORDS = ("verify", "--backbone", "resnet_tiny", "--stages", 2, "--size", "300x280", "--tile", 64)

    def test_json(self) -> None:
        outcome = call(*self.WORDS, "--json")
        assert outcome.status == 0, outcome
        found = json.loads(outcome.out)
        assert [set(stage) for stage in found["stages"]] == [{"stage", "tiles", "output_error", "gradient_error"}] * 2
        assert 0 < found["max_gradient_error"] <= 1e-9
        assert len(outcome.err) == found["enlarged"]

    def test_table(self) -> None:
        outcome = call(*self.WORDS)
        assert outcome.status == 0
        assert "Streamed equals whole: the largest error is " in outcome.out

    @pytest.mark.parametrize("error", [1e-3, float("inf")])
    def test_exits_1_where_streaming_is_not_exact(self, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
        stage = {"stage": 1, "tiles": 9, "output_error": error, "gradient_error": error}
        found = {"backbone": "x", "dtype": "fp64", "size": "300x280", "enlarged": False, "stages": [stage]}
        found |= {"max_gradient_error": error, "tolerance": 1e-9}
        monkeypatch.setattr("wholeslide.verify.verify", lambda config: found)
        assert "Streaming is NOT exact here" in call(*self.WORDS).out
        assert call(*self.WORDS, "--json").status == 1


def test_a_folder_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        errors = refused("predict", folder / "run", folder / "s0.png", "--out", tmp_path / "new.csv", "--quiet")
    finally:
        tmp_path.chmod(0o700)
    assert errors[0].startswith("permission denied (")


class TestBenchMemory:
    ROW = {  # noqa: RUF012
        **{"method": "local", "stages": 8, "mode": "streamed", "store": "host", "dtype": "bf16", "width": 600},
        **{"height": 500, "peak_bytes": 3 << 30, "baseline_bytes": 1 << 30, "seconds": 2.5},
    }

    def measure(self, monkeypatch: pytest.MonkeyPatch, out: Path, *rows: dict[str, object]) -> Outcome:
        def bench(config: object, *, on_row: Callable[[dict[str, object]], None]) -> dict[str, object]:
            for row in rows:
                on_row(row)
            return {"environment": {"cores": 2}, "rows": list(rows)}

        monkeypatch.setattr("wholeslide.bench.memory.bench_memory", bench)
        return call("bench", "memory", "--sizes", "600x500", "--out", out)

    def test_file_and_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "new" / "memory.json"
        outcome = self.measure(monkeypatch, out, self.ROW)
        assert outcome.status == 0, outcome
        assert outcome.err == ["local streamed K=8 host 600x500: 2.0 GiB over the baseline, 2.5 s"]
        assert "2.0 GiB" in outcome.out
        content = json.loads(out.read_text())
        assert (content["environment"], content["rows"]) == ({"cores": 2}, [self.ROW])
        assert content["command"].startswith("wholeslide bench memory --sizes 600x500 --methods local --stages 8 ")
        again = parse(load("bench memory"), content["command"].split()[3:])
        assert again.bench.sizes == "600x500"

    def test_nothing_could_be_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        unmeasured = {"method": "end-to-end", "measured": False, "reason": "out of memory"}
        assert self.measure(monkeypatch, tmp_path / "memory.json", unmeasured).status == 1
        assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [unmeasured]

    def test_a_choice_that_does_not_exist(self, tmp_path: Path) -> None:
        assert refused("bench", "memory", "--modes", "foo", "--out", tmp_path / "memory.json")[0].startswith(
            "not a choice (--modes foo): "
        )
