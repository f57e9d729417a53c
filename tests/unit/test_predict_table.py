from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from wholeslide.errors import RunError
from wholeslide.predict.table import PredictionTable, columns_of

COLUMNS = columns_of(["benign", "with, comma"])


def row(file: str, **others: object) -> dict[str, object]:
    return {"file": file, "slide": file, "patient": file, **others}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_columns() -> None:
    assert COLUMNS == ("file", "slide", "patient", "prediction", "prob_benign", "prob_with, comma", "error")


def test_every_row_is_there_as_soon_as_it_is_added(tmp_path: Path) -> None:
    table = PredictionTable.create(tmp_path / "new" / "out.csv", COLUMNS)
    table.write()
    assert read(table.path) == []
    table.add(row("😐.svs", prediction="benign", **{"prob_benign": 1 / 3, "prob_with, comma": 2 / 3}))
    table.add(row('a "b"\nc.svs', error="cannot, be read"))
    first, second = read(table.path)
    assert first["file"] == "😐.svs"
    assert float(first["prob_benign"]) == 1 / 3
    assert (first["error"], second["prediction"], second["prob_benign"]) == ("", "", "")
    assert second["file"] == 'a "b"\nc.svs'


def test_numbers_of_numpy_are_plain(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    table = PredictionTable.create(tmp_path / "out.csv", COLUMNS)
    table.add(row("a", prob_benign=float(numpy.float64(0.25))))
    assert read(table.path)[0]["prob_benign"] == "0.25"


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("precious")
    with pytest.raises(RunError, match=r"the file exists \(.*out.csv\): add --resume to go on with it"):
        PredictionTable.create(tmp_path / "out.csv", COLUMNS)
    assert (tmp_path / "out.csv").read_text() == "precious"


def test_resume_keeps_predictions_and_drops_errors(tmp_path: Path) -> None:
    table = PredictionTable.create(tmp_path / "out.csv", COLUMNS)
    table.add(row("a.svs", prediction="benign", prob_benign=0.1234567890123456789))
    table.add(row("b.svs", error="cannot be read"))
    again = PredictionTable.resume(table.path, COLUMNS)
    assert again.done == {"a.svs"}
    again.add(row("b.svs", prediction="benign"))
    rows = read(table.path)
    assert [(line["file"], line["error"]) for line in rows] == [("a.svs", ""), ("b.svs", "")]
    assert float(rows[0]["prob_benign"]) == 0.1234567890123456789


def test_resume_without_a_file_begins(tmp_path: Path) -> None:
    assert PredictionTable.resume(tmp_path / "out.csv", COLUMNS).done == frozenset()


@pytest.mark.parametrize("text", ["", "file,slide\na,b\n", ",".join(COLUMNS[:4]) + "\n"])
def test_resume_refuses_another_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.csv").write_text(text)
    with pytest.raises(RunError, match=r"not a table of this run's predictions .*its columns have to be file,slide,"):
        PredictionTable.resume(tmp_path / "out.csv", COLUMNS)
    assert (tmp_path / "out.csv").read_text() == text


def test_resume_refuses_half_a_row(tmp_path: Path) -> None:
    header = '"' + '","'.join(COLUMNS) + '"\n'
    (tmp_path / "out.csv").write_text(header + "a.svs,a\n")
    with pytest.raises(RunError, match="not a table"):
        PredictionTable.resume(tmp_path / "out.csv", COLUMNS)


def test_a_full_disk_leaves_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = PredictionTable.create(tmp_path / "out.csv", COLUMNS)
    table.add(row("a.svs", prediction="benign"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"the disk is full \(.*out.csv\): free some space"):
        table.add(row("b.svs", prediction="benign"))
    assert [line["file"] for line in read(table.path)] == ["a.svs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
