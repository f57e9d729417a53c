"""A table of predictions is gone on with by what made it, and slides are told apart by their paths."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from wholeslide.errors import RunError
from wholeslide.predict.output import MadeWith, PredictionOutput, record_path
from wholeslide.predict.table import columns_of

COLUMNS = columns_of(["a", "b"])
MADE_WITH = MadeWith("0123", {"mpp": "2.0", "mpp_override": "None"})


def output(path: Path, made_with: MadeWith = MADE_WITH) -> PredictionOutput:
    return PredictionOutput.open(path, COLUMNS, made_with, resume=True)


def slides(**paths: Path) -> pd.DataFrame:
    return pd.DataFrame({"file": list(paths), "path": [str(path) for path in paths.values()]}, dtype=object)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table with a prediction for ``one``, whose file is rome/one, and an error for ``two``."""
    begun = output(tmp_path / "out.csv")
    begun.lacking(slides(one=tmp_path / "rome" / "one", two=tmp_path / "rome" / "two"))
    begun.begin()
    begun.add({"file": "one", "prediction": "a"})
    begun.add({"file": "two", "error": "cannot be read"})
    return tmp_path / "out.csv"


def test_what_is_done_is_told_by_its_path(table: Path, tmp_path: Path) -> None:
    again = slides(one=tmp_path / "rome" / "one", two=tmp_path / "rome" / "two", three=tmp_path / "three")
    assert list(output(table).lacking(again)["file"]) == ["two", "three"]
    (tmp_path / "link").symlink_to(tmp_path / "rome")
    assert list(output(table).lacking(slides(other=tmp_path / "link" / "one"))["file"]) == []
    elsewhere = tmp_path / "oslo" / "one"
    assert list(output(table).lacking(slides(one=elsewhere))["file"]) == [str(elsewhere)]


def test_the_record_grows_with_the_table(table: Path, tmp_path: Path) -> None:
    resumed = output(table)
    resumed.lacking(slides(one=tmp_path / "oslo" / "one"))
    resumed.begin()
    content = json.loads(record_path(table).read_text())
    assert list(content["slides"]) == ["one", "two", str(tmp_path / "oslo" / "one")]
    assert [row["file"] for row in output(table).table.rows] == ["one"]


def test_a_new_table_has_a_new_record(table: Path) -> None:
    table.unlink()
    assert output(table, MadeWith("4567", {})).slides == {}


def test_other_origins_are_refused(table: Path) -> None:
    with pytest.raises(RunError, match=r"made with another checkpoint \(.*out\.csv\): give the run that made them"):
        output(table, MadeWith("4567", MADE_WITH.reading))
    with pytest.raises(RunError) as caught:
        output(table, MadeWith("0123", {"mpp": "1.0", "mpp_override": "0.5"}))
    assert [problem.what.partition("made with ")[2] for problem in caught.value.problems] == [
        "--mpp 2.0, not 1.0",
        "--mpp-override None, not 0.5",
    ]


def test_a_table_without_its_record_is_refused(table: Path) -> None:
    record = record_path(table)
    whole = record.read_text()
    for damaged in ("", "[]", whole[:40], whole.replace('"one"', '"other"'), whole.replace('"reading"', '"red"')):
        record.write_text(damaged)
        with pytest.raises(RunError, match=r"this is damaged, or the record of another table \(.*made-with\.json\)"):
            output(table)
    record.write_text(whole.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(RunError, match="format version 2 is unknown"):
        output(table)
    record.unlink()
    with pytest.raises(RunError, match=r"nothing tells what .*: put out\.csv\.made-with\.json back beside it"):
        output(table)
