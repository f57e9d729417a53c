"""The commands that stand by themselves: split, inspect, verify and bench memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import train_tiny  # noqa: F401  registers the backbone resnet_micro
from cli_cases import (
    Outcome,
    call,
    cohort,
    refused,
    tiff,
)

from wholeslide.bench.result import Result
from wholeslide.cli import load
from wholeslide.cli.parser import parse


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cohort(tmp_path_factory.mktemp("cohort"), 20)


class TestSplitAndInspect:
    def test_split(self, labels: Path, tmp_path: Path) -> None:
        outcome = call("split", labels, "--out", tmp_path / "split.csv", "--fractions", "0.5,0.25,0.25")
        assert outcome.status == 0
        table = pd.read_csv(tmp_path / "split.csv")
        assert table["split"].value_counts().to_dict() == {"train": 10, "valid": 5, "test": 5}
        assert str(tmp_path / "split.csv") in outcome.out
        again = call("split", labels, "--out", tmp_path / "again.csv", "--fractions", "0.5,0.25,0.25")
        assert again.status == 0
        assert (tmp_path / "again.csv").read_text() == (tmp_path / "split.csv").read_text()

    def test_folds(self, labels: Path, tmp_path: Path) -> None:
        outcome = call("split", labels, "--out", tmp_path / "folds.csv", "--folds", 5)
        assert outcome.status == 0
        assert outcome.out.endswith(f"train {tmp_path / 'folds.csv'} --slides SLIDES --out RUN --fold 0\n")
        assert pd.read_csv(tmp_path / "folds.csv")["fold"].value_counts().to_dict() == dict.fromkeys(range(5), 4)

    def test_folds_are_drawn_several_times(self, labels: Path, tmp_path: Path) -> None:
        found = call("split", labels, "--out", tmp_path / "folds.csv", "--folds", 3, "--repeats", 2, "--seed", 4)
        assert found.status == 0
        draws = [pd.read_csv(tmp_path / f"folds-{number}.csv")["fold"] for number in (1, 2)]
        assert not (tmp_path / "folds.csv").exists()
        assert not draws[0].equals(draws[1])
        call("split", labels, "--out", tmp_path / "second.csv", "--folds", 3, "--seed", 5)
        assert pd.read_csv(tmp_path / "second.csv")["fold"].equals(draws[1])
        told = refused("split", labels, "--out", tmp_path / "x.csv", "--repeats", 2)
        assert told == ["not a number of draws (--repeats 2): give 1 or more, with --folds"]

    def test_a_split_that_is_drawn_anew_is_told(self, labels: Path, tmp_path: Path) -> None:
        first, second = tmp_path / "first.csv", tmp_path / "second.csv"
        assert "drawn anew" not in call("split", labels, "--out", first).err
        assert f"the column split of {first} is drawn anew" in call("split", first, "--out", second, "--seed", 3).err

    def test_the_manifest_is_not_overwritten(self, labels: Path) -> None:
        path = labels
        assert refused("split", path, "--out", path) == [
            f"this would overwrite the manifest (--out {path}): give another file"
        ]

    def test_fractions_that_are_no_split(self, labels: Path, tmp_path: Path) -> None:
        words = ["split", labels, "--out", tmp_path / "x.csv", "--fractions", "0.5,0.5,0.5"]
        assert refused(*words)[0].startswith("not a split (--fractions 0.5,0.5,0.5): ")

    def test_pictures_of_one_name_do_not_replace_each_other(self, tmp_path: Path) -> None:
        paths = [tiff(tmp_path / folder / "a.tiff", mpp=1.0) for folder in "xy"]
        assert refused("inspect", *paths, "--overlay", tmp_path / "pictures") == [
            f"2 slides would get the same picture a.tiff.png ({paths[0]}, {paths[1]}): "
            "look at one of them at a time, each with an --overlay of its own"
        ]
        assert not (tmp_path / "pictures").exists()

    def test_slides_that_differ_in_their_ending_get_two_pictures(self, tmp_path: Path) -> None:
        paths = [tiff(tmp_path / name, mpp=1.0) for name in ("a.tiff", "a.tif", "b.tiff")]
        assert call("inspect", *paths, "--overlay", tmp_path / "pictures").status == 0
        pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
        assert pictures == {"a.tiff.png", "a.tif.png", "b.png"}

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
        assert outcome.errors == [f"no such file ({tmp_path / 'nowhere.svs'}): check the path"]


class TestVerify:
    WORDS = ("verify", "--backbone", "resnet_micro", "--stages", 2, "--size", "300x280", "--tile", 64)

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


class TestBenchMemory:
    ROW: ClassVar[dict[str, object]] = {
        **{"method": "local", "stages": 8, "mode": "streamed", "store": "host", "dtype": "bf16", "width": 600},
        **{"height": 500, "peak_bytes": 3 << 30, "baseline_bytes": 1 << 30, "seconds": 2.5, "tissue_fraction": 0.35},
        **{"dense_flops": 4e12, "active_flops": 1e12, "computed_flops": 2e12, "predicted_error": -0.04},
        **{"dense_gemm_fraction": 0.9, "computed_gemm_fraction": 0.45},
    }
    CASE = ("method", "stages", "mode", "store", "dtype", "width", "height", "tissue_fraction")
    WHOLE: ClassVar[dict[str, object]] = {
        **ROW,
        **{"method": "end-to-end", "stages": 1, "mode": "whole", "store": "none", "predicted_error": None},
        "peak_bytes": 9 << 30,
    }

    def measure(
        self, monkeypatch: pytest.MonkeyPatch, out: Path, *rows: dict[str, object], options: tuple[object, ...] = ()
    ) -> Outcome:
        def bench(config: object, result: Result, *, on_row: Callable[[dict[str, object]], None]) -> Result:
            result.environment = {"cores": 2}
            for row in rows:
                result.add(row)
                on_row(row)
            result.finish()
            return result

        monkeypatch.setattr("wholeslide.bench.memory.bench_memory", bench)
        return call("bench", "memory", "--sizes", "600x500", "--out", out, *options)

    def test_file_and_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "new" / "memory.json"
        outcome = self.measure(monkeypatch, out, self.ROW)
        assert outcome.status == 0, outcome
        assert outcome.err == ["local streamed K=8 host 600x500: 2.0 GiB over the baseline, 2.5 s"]
        for part in ("2.0 GiB", "35%", "-4%", "2.00", "90%", "45%"):
            assert part in outcome.out
        assert "percent of end to end" not in outcome.out
        content = json.loads(out.read_text())
        assert (content["environment"], content["rows"]) == ({"cores": 2}, [self.ROW])
        assert content["command"].startswith("wholeslide bench memory --sizes 600x500 --methods local --stages 8 ")
        again = parse(load("bench memory"), content["command"].split()[3:])
        assert again.bench.sizes == "600x500"

    def test_beside_the_paper(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        picture = tmp_path / "new" / "memory.png"
        options = ("--plot", picture, "--methods", "local,end-to-end", "--modes", "streamed,whole")
        rows = ({**self.ROW, "width": 8698, "height": 7496}, self.WHOLE)
        outcome = self.measure(monkeypatch, tmp_path / "memory.json", *rows, options=options)
        assert outcome.status == 0, outcome
        for part in ("3.71 G", "20.7%", "*", "resident memory of a process on a CPU", "GPU memory", "extrapolated"):
            assert part in outcome.out
        assert picture.read_bytes().startswith(b"\x89PNG")
        command = json.loads((tmp_path / "memory.json").read_text())["command"]
        assert parse(load("bench memory"), command.split()[3:]).plot == picture

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--plot", "a.png"), "nothing to be in percent of (--plot a.png): add --methods local,end-to-end"),
            (("--plot", "a.txt"), "not a picture (--plot a.txt): end it in .png, .svg, .pdf"),
            (
                ("--over-baseline", "1GiB", "--memory", "2GiB"),
                "two limits of memory (--memory 2GiB --over-baseline 1GiB)",
            ),
            (("--over-baseline", "much"), "not a size of memory (--over-baseline much): "),
            (("--tissue-fractions", "1.5"), "not parts of an area (--tissue-fractions 1.5): "),
        ],
    )
    def test_options_that_make_no_sense(self, options: tuple[str, ...], message: str, tmp_path: Path) -> None:
        assert refused("bench", "memory", "--out", tmp_path / "memory.json", *options)[0].startswith(message)

    def test_nothing_could_be_measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        unmeasured = {**{key: self.WHOLE[key] for key in self.CASE}, "measured": False, "reason": "out of memory"}
        assert self.measure(monkeypatch, tmp_path / "memory.json", unmeasured).status == 1
        assert json.loads((tmp_path / "memory.json").read_text())["rows"] == [unmeasured]
        mendable = {**unmeasured, "reason": "not enough memory (--over-baseline 1MiB): give more", "mendable": True}
        outcome = self.measure(monkeypatch, tmp_path / "memory.json", mendable)
        assert outcome.status == 2
        assert outcome.err == ["error: not enough memory (--over-baseline 1MiB): give more"]

    def test_a_choice_that_does_not_exist(self, tmp_path: Path) -> None:
        assert refused("bench", "memory", "--modes", "foo", "--out", tmp_path / "memory.json")[0].startswith(
            "not a choice (--modes foo): "
        )
