"""Tables of predictions as CSV: read, written whole, and grown row by row."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from wholeslide.errors import RunError
from wholeslide.slides.lock import lock_open_file
from wholeslide.train.checkpoint import disk_errors, write_atomically

Row = Mapping[str, object]

IDENTITY = ("file", "slide", "patient", "prediction")


def columns_of(classes: Sequence[str]) -> tuple[str, ...]:
    """``file, slide, patient, prediction, prob_<class>…, error``."""
    return (*IDENTITY, *(f"prob_{name}" for name in classes), "error")


def csv_line(values: Sequence[object]) -> str:
    """One line of CSV, with its end. A float is written so that it reads back bit by bit."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def row_bytes(row: Row, columns: Sequence[str]) -> bytes:
    """A row of a table; columns that it lacks are empty."""
    return _encoded(csv_line([_text(row.get(name, "")) for name in columns]))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace a table; whoever reads it sees the old or the new one, whole.

    Raises:
        RunError: the disk is full, and the file is as it was.
    """
    content = _encoded(csv_line(columns)) + b"".join(row_bytes(row, columns) for row in rows)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table, without a last one that a kill cut off.

    Raises:
        RunError: it is not a table with these columns.
    """
    text = whole_rows(path.read_bytes()).decode("utf-8", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = tuple(reader.fieldnames or ())
    rows = list(reader) if header == tuple(columns) else []
    if header != tuple(columns) or any(None in row or None in row.values() for row in rows):
        raise RunError.single(
            "not a table of this run's predictions",
            where=str(path),
            remedy=f"its columns have to be {','.join(columns)}; give another --out",
        )
    return rows


def whole_rows(content: bytes) -> bytes:
    """A CSV's content up to the end of its last complete row. Quotes may enclose line ends, which end no row."""
    end = position = quotes = 0
    for line in content.split(b"\n")[:-1]:
        position += len(line) + 1
        quotes += line.count(b'"')
        if quotes % 2 == 0:
            end = position
    return content[:end]


class RowWriter:
    """Adds rows to a table, each by one write at the file's end that is on disk before the next.

    However long the table is, a row costs the same. A kill can cut off the last row, which `read_rows` then leaves out.
    The file is locked, so that no other process adds to it.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Go on with a table that is there.

        Raises:
            RunError: another process is adding to it.
        """
        self.path = path
        self.columns = tuple(columns)
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            lock_open_file(self._handle, path)
        except BaseException:
            os.close(self._handle)
            raise

    def add(self, row: Row) -> None:
        """Write one more row.

        Raises:
            RunError: the disk is full; the rows before are still there, whole.
        """
        size_bytes = os.fstat(self._handle).st_size
        left = row_bytes(row, self.columns)
        with disk_errors(self.path):
            try:
                while left:  # one write, but for a disk that is full
                    left = left[os.write(self._handle, left) :]
                os.fsync(self._handle)
            except OSError:
                os.ftruncate(self._handle, size_bytes)
                raise

    def close(self) -> None:
        """Let others add to the table."""
        os.close(self._handle)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
