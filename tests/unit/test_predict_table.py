from __future__ import annotations

import csv
import os
from contextlib import closing
from pathlib import Path

import pytest

from wholeslide.errors import RunError
from wholeslide.predict.table import RowWriter, columns_of, read_rows, whole_rows, write_rows

COLUMNS = columns_of(["benign", "with, comma"])
TRICKY = 'a "b"\nc.svs'


def row(file: str, **others: object) -> dict[str, object]:
    return {"file": file, "slide": file, "patient": file, **others}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, *rows: dict[str, object]) -> None:
    with closing(RowWriter(path, COLUMNS)) as writer:
        for one in rows:
            writer.add(one)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """An empty table."""
    write_rows(tmp_path / "new" / "out.csv", COLUMNS, [])
    return tmp_path / "new" / "out.csv"


def test_columns() -> None:
    assert COLUMNS == ("file", "slide", "patient", "prediction", "prob_benign", "prob_with, comma", "error")


def test_every_row_is_there_as_soon_as_it_is_added(table: Path) -> None:
    assert read(table) == []
    with closing(RowWriter(table, COLUMNS)) as writer:
        writer.add(row("😐.svs", prediction="benign", **{"prob_benign": 1 / 3, "prob_with, comma": 2 / 3}))
        assert len(read(table)) == 1
        writer.add(row(TRICKY, error="cannot, be read"))
        first, second = read(table)
    assert first["file"] == "😐.svs"
    assert float(first["prob_benign"]) == 1 / 3
    assert (first["error"], second["prediction"], second["prob_benign"]) == ("", "", "")
    assert second["file"] == TRICKY
    assert read_rows(table, COLUMNS) == [first, second]


def test_added_rows_equal_written_ones(table: Path, tmp_path: Path) -> None:
    rows = [row("a", prediction="benign", prob_benign=0.1234567890123456789), row(TRICKY, error="bad")]
    add(table, *rows)
    write_rows(tmp_path / "whole.csv", COLUMNS, rows)
    assert table.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    write_rows(tmp_path / "again.csv", COLUMNS, read_rows(table, COLUMNS))
    assert (tmp_path / "again.csv").read_bytes() == table.read_bytes()


def test_a_row_is_one_write_however_long_the_table_is(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: written.append(len(content)) or write(handle, content))
    add(table, *(row(f"{index:04}") for index in range(200)))
    assert len(written) == 200
    assert len(set(written)) == 1


def test_numbers_of_numpy_are_plain(table: Path) -> None:
    numpy = pytest.importorskip("numpy")
    add(table, row("a", prob_benign=float(numpy.float64(0.25))))
    assert read(table)[0]["prob_benign"] == "0.25"


def test_two_writers_at_once_are_refused(table: Path) -> None:
    with closing(RowWriter(table, COLUMNS)), pytest.raises(RunError, match="another process is writing this file"):
        RowWriter(table, COLUMNS)
    RowWriter(table, COLUMNS).close()


def test_a_row_that_a_kill_cut_off_is_left_out_wherever_it_was_cut(table: Path) -> None:
    """The line end within quotes is the trap: a cut right after it leaves a file that ends like a whole row."""
    add(table, row("one", prediction="benign"))
    whole = table.read_bytes()
    add(table, row(TRICKY, error=f"{TRICKY} is bad"))
    longer = table.read_bytes()
    cuts = range(len(whole), len(longer))
    assert any(longer[:cut].endswith(b"\n") for cut in cuts[1:])
    for cut in cuts:
        table.write_bytes(longer[:cut])
        assert [line["file"] for line in read_rows(table, COLUMNS)] == ["one"], longer[:cut]
        assert whole_rows(longer[:cut]) == whole
    table.write_bytes(longer)
    assert len(read_rows(table, COLUMNS)) == 2


def test_the_cuts_tell_a_reader_that_minds_line_ends_only() -> None:
    """The test above can fail: without counting quotes a part of a row passes for a whole one."""

    def up_to_the_last_line_end(content: bytes) -> bytes:
        return content[: content.rfind(b"\n") + 1]

    content = b'file,error\n"a\nb'
    assert up_to_the_last_line_end(content) != whole_rows(content) == b"file,error\n"


@pytest.mark.parametrize("text", ["", "file,slide\na,b\n", ",".join(COLUMNS[:4]) + "\n"])
def test_another_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.csv").write_text(text)
    with pytest.raises(RunError, match=r"not a table of this run's predictions .*its columns have to be file,slide,"):
        read_rows(tmp_path / "out.csv", COLUMNS)
    assert (tmp_path / "out.csv").read_text() == text


def test_a_line_that_is_too_short_is_refused(tmp_path: Path) -> None:
    header = '"' + '","'.join(COLUMNS) + '"\n'
    (tmp_path / "out.csv").write_text(header + "a.svs,a\n")
    with pytest.raises(RunError, match="not a table"):
        read_rows(tmp_path / "out.csv", COLUMNS)


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_rows_before(table: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """The disk takes a part of the row, then nothing."""
    add(table, row("a.svs", prediction="benign"))
    before, write = table.read_bytes(), os.write

    def full(handle: int, *content: bytes) -> int:
        if content and len(content[0]) > 5:
            return write(handle, content[0][:5])
        raise OSError(28, "No space left on device")

    with closing(RowWriter(table, COLUMNS)) as writer:
        monkeypatch.setattr(os, fails, full)
        with pytest.raises(RunError, match=r"the disk is full \(.*out.csv\): free some space"):
            writer.add(row("b.svs", prediction="benign"))
        monkeypatch.undo()
        assert table.read_bytes() == before
        writer.add(row("c.svs", prediction="benign"))
    assert [line["file"] for line in read(table)] == ["a.svs", "c.svs"]
    assert [path.name for path in table.parent.iterdir()] == ["out.csv"]
