"""The demonstration from end to end, on few and small slides."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from wholeslide.cli import main
from wholeslide.demo.cohort import DemoCohortConfig
from wholeslide.demo.run import DemoResult, demo, train_config
from wholeslide.errors import RunError
from wholeslide.train.run import Run

SMALL = DemoCohortConfig(train_pairs=3, valid_pairs=2, test_pairs=2, tissue_px=(560, 600))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    """A demonstration where there was one before, as when `make demo` is called again."""
    out = tmp_path_factory.mktemp("demonstration") / "out"
    for name in ("run", "slides"):
        (out / name).mkdir(parents=True)
        (out / name / "old.txt").write_text("of the one before")
    (out / "demo.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    return out, demo(out, 0, cohort=SMALL, epochs=1, control_pairs=10)


def test_the_run_lies_in_the_folder(found: tuple[Path, DemoResult]) -> None:
    out, result = found
    assert result.run_dir == out / "run"
    run = Run.open(result.run_dir)
    assert run.classes == ("disc", "ring")
    metrics = json.loads((run.path / "metrics" / "test.json").read_text())
    assert metrics["auroc"]["value"] == result.auroc
    assert len(pd.read_csv(run.path / "predictions" / "test.csv")) == result.test_slides == 4


def test_pairs_are_never_cut(found: tuple[Path, DemoResult]) -> None:
    cohort = pd.read_csv(found[0] / "run" / "cohort.csv")
    assert all(len(set(pair["split"])) == 1 for _, pair in cohort.groupby("pair"))


def test_an_earlier_demonstration_is_replaced_and_nothing_else(found: tuple[Path, DemoResult]) -> None:
    assert (found[0] / "notes.txt").read_text() == "mine"
    assert list(found[0].rglob("old.txt")) == []


def test_what_is_printed(found: tuple[Path, DemoResult]) -> None:
    out, result = found
    network, _, colours, patches, seconds, where = result.lines()
    assert network.startswith(f"Whole-slide network: test AUROC {result.auroc:.3f} (95% interval ")
    assert "logistic regression on colour histograms: AUROC" in colours
    assert "attention pooling over 16 px patches: AUROC" in patches
    assert colours.endswith("(20 slides)")
    assert patches.endswith("(20 slides)")
    assert all(part in seconds for part in ("slides ", "training ", "evaluation ", "controls "))
    assert str(out / "run") in where
    stored = json.loads((out / "demo.json").read_text())
    assert stored["auroc"] == result.auroc
    assert stored["run_dir"] == "run"


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(RunError, match="the folder is not empty and no demonstration's"):
        demo(tmp_path)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: the folder is not empty and no demonstration's ({tmp_path}): name another one with --out\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="not a folder"):
        demo(tmp_path / "out")


def test_the_demonstration_needs_no_internet() -> None:
    config = train_config(Path("manifest.csv"), Path("out"), seed=0, epochs=1)
    assert config.weights == "random"
    assert config.group == "pair"


def test_the_command_draws_a_report_with_pictures(
    found: tuple[Path, DemoResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = found
    monkeypatch.setattr("wholeslide.demo.run.demo", lambda *_: result)
    assert main(["demo", "--out", str(out)]) == 0
    page = out / "run" / "report.html"
    assert str(page) in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count("<img") == 2 * result.test_slides
