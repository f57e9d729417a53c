"""A table of predictions is gone on with by what made it, and slides are told apart by their paths."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from wholeslide.errors import RunError
from wholeslide.predict.output import MadeWith, PredictionOutput, record_path, row_writer
from wholeslide.predict.table import Row, columns_of, read_rows
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.files import own_part

COLUMNS = columns_of(["a", "b"])
MADE_WITH = MadeWith("0123", {"mpp": "2.0", "mpp_override": "None"})


def output(path: Path, made_with: MadeWith = MADE_WITH) -> PredictionOutput:
    return PredictionOutput.open(path, COLUMNS, made_with, resume=True)


def slides(**paths: Path) -> pd.DataFrame:
    return pd.DataFrame({"file": list(paths), "path": [str(path) for path in paths.values()]}, dtype=object)


def add(table: Path, *rows: Row, rank: int = 0, processes: int = 1) -> None:
    with row_writer(table, COLUMNS, rank=rank, processes=processes) as writer:
        for row in rows:
            writer.add(row)


def predicted(*files: str) -> list[dict[str, object]]:
    return [{"file": file, "prediction": "a", "prob_a": 1 / 3} for file in files]


def files(path: Path) -> list[str]:
    return [row["file"] for row in read_rows(path, COLUMNS)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table with a prediction for ``one``, whose file is rome/one, and an error for ``two``."""
    begun = output(tmp_path / "out.csv")
    begun.named(slides(one=tmp_path / "rome" / "one", two=tmp_path / "rome" / "two"))
    begun.begin()
    add(begun.path, *predicted("one"), {"file": "two", "error": "cannot be read"})
    return begun.path


def test_what_is_done_is_told_by_its_path(table: Path, tmp_path: Path) -> None:
    again = slides(one=tmp_path / "rome" / "one", two=tmp_path / "rome" / "two", three=tmp_path / "three")
    assert list(output(table).named(again)["file"]) == ["one", "two", "three"]
    assert list(output(table).done) == ["one"]
    (tmp_path / "link").symlink_to(tmp_path / "rome")
    assert list(output(table).named(slides(other=tmp_path / "link" / "one"))["file"]) == ["one"]
    elsewhere = tmp_path / "oslo" / "one"
    assert list(output(table).named(slides(one=elsewhere))["file"]) == [str(elsewhere)]


def test_the_record_grows_with_the_table(table: Path, tmp_path: Path) -> None:
    resumed = output(table)
    resumed.named(slides(one=tmp_path / "oslo" / "one"))
    resumed.begin()
    content = json.loads(record_path(table).read_text())
    assert list(content["slides"]) == ["one", "two", str(tmp_path / "oslo" / "one")]
    assert [row["file"] for row in output(table).rows] == ["one"]


class TestSeveralProcesses:
    @pytest.fixture
    def begun(self, tmp_path: Path) -> PredictionOutput:
        """Four slides, of which a former run of one process had predicted s0."""
        names = slides(**{f"s{index}": tmp_path / f"s{index}" for index in range(4)})
        one = output(tmp_path / "out.csv")
        one.named(names)
        one.begin()
        add(one.path, *predicted("s0"))
        several = output(tmp_path / "out.csv")
        several.named(names)
        several.begin()
        return several

    def test_every_row_is_in_the_table_or_beside_it(self, begun: PredictionOutput) -> None:
        add(begun.path, *predicted("s3"), rank=0, processes=2)
        add(begun.path, *predicted("s1"), rank=1, processes=2)
        assert files(begun.path) == ["s0"]
        assert {path.name: files(path) for path in (begun.path.parent / "out.csv.rows").iterdir()} == {
            "0.csv": ["s3"],
            "1.csv": ["s1"],
        }

    def test_the_end_is_one_table_in_the_order_of_the_inputs(self, begun: PredictionOutput) -> None:
        add(begun.path, *predicted("s3"), rank=1, processes=2)
        begun.finish(predicted("s1", "s2", "s3"))
        assert files(begun.path) == ["s0", "s1", "s2", "s3"]
        assert sorted(path.name for path in begun.path.parent.iterdir()) == ["out.csv", "out.csv.made-with.json"]

    @pytest.mark.parametrize("deleted", [False, True], ids=["table", "no table"])
    def test_a_resume_takes_the_rows_of_any_number_of_processes(self, begun: PredictionOutput, deleted: bool) -> None:
        """Also where a kill left a part of a row, or came between the table's writing and the removal of the others."""
        add(begun.path, *predicted("s3", "s1"), rank=2, processes=3)
        part = begun.path.parent / "out.csv.rows" / "2.csv"
        part.write_bytes(part.read_bytes()[:-5])
        add(begun.path, *predicted("s0", "s2"), {"file": "s1", "error": "bad"}, rank=0, processes=3)
        for file in (part.parent / "1.csv", begun.path, record_path(begun.path)):
            own_part(file).write_text("fil")
        of_another = own_part(begun.path.with_name("other.out.csv"))
        of_another.touch()
        if deleted:
            begun.path.unlink()
        resumed = output(begun.path)
        assert set(resumed.done) == {"s0", "s2", "s3"}
        resumed.begin()
        assert sorted(files(begun.path)) == ["s0", "s2", "s3"]
        assert set(begun.path.parent.iterdir()) == {begun.path, record_path(begun.path), of_another}

    def test_rows_beside_a_table_are_not_overwritten(self, begun: PredictionOutput) -> None:
        add(begun.path, *predicted("s1"), rank=0, processes=2)
        begun.path.unlink()
        with pytest.raises(RunError, match=r"the file exists \(.*out\.csv\.rows/0\.csv\): add --resume"):
            PredictionOutput.open(begun.path, COLUMNS, MADE_WITH, resume=False)

    def test_a_process_that_outlived_the_others_is_in_the_way(self, begun: PredictionOutput) -> None:
        refused = pytest.raises(RunError, match=r"another process is writing this file \(.*out\.csv\.rows/1\.csv\)")
        with row_writer(begun.path, COLUMNS, rank=1, processes=2), refused:
            output(begun.path)
        assert output(begun.path)

    def test_what_is_not_ours_stays(self, begun: PredictionOutput) -> None:
        add(begun.path, rank=0, processes=2)
        (begun.path.parent / "out.csv.rows" / "notes.txt").write_text("mine")
        begun.finish(predicted("s1"))
        assert [path.name for path in (begun.path.parent / "out.csv.rows").iterdir()] == ["notes.txt"]


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


def test_other_ranges_of_8_bit_numbers_are_refused(table: Path) -> None:
    table.unlink()
    first, second = (MadeWith.of("0123", SlideConfig(), precision="int8", calibration=found) for found in ("12", "34"))
    begun = output(table, first)
    begun.named(slides(one=table.parent / "one.png"))
    begun.begin()
    add(table, *predicted("one"))
    assert set(output(table, first).done) == {"one"}
    refused = r"made with other ranges of 8-bit numbers \(.*out\.csv\): put back the run's calibration\.safetensors"
    with pytest.raises(RunError, match=refused):
        output(table, second)
    with pytest.raises(RunError, match="made with --precision int8, not None") as caught:
        output(table, MadeWith.of("0123", SlideConfig()))
    assert len(caught.value.problems) == 1, "the ranges go with the precision"


def test_where_files_are_decoded_makes_no_other_table(table: Path) -> None:
    one, other = (MadeWith.of("0123", SlideConfig(decoders=place)) for place in ("threads", "processes"))
    assert one == other
    assert "icc" in one.reading
    record = record_path(table)
    older = json.loads(record.read_text())
    older["reading"] = one.reading | {"decoders": "auto"}  # as it was once recorded
    record.write_text(json.dumps(older))
    assert [row["file"] for row in output(table, other).rows] == ["one"]


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
