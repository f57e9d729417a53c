"""The table of predictions that is written row by row, whole at every moment."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from wholeslide.errors import RunError
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


class PredictionTable:
    """A CSV file that grows by one row at a time.

    Each row replaces the file by one that is a row longer, written beside it and renamed: if the process is killed
    or the disk fills up, the file is still there, with whole rows.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.rows: list[dict[str, str]] = []

    @classmethod
    def create(cls, path: Path, columns: Sequence[str]) -> PredictionTable:
        """A new table.

        Raises:
            RunError: the file exists, or its folder cannot be made.
        """
        if path.exists():
            raise RunError.single(
                "the file exists", where=str(path), remedy="add --resume to go on with it, or give another --out"
            )
        return cls(path, columns)

    @classmethod
    def resume(cls, path: Path, columns: Sequence[str]) -> PredictionTable:
        """Go on with a table; slides that could not be read are dropped, to be tried again.

        Raises:
            RunError: it is not a table of this run's predictions.
        """
        table = cls(path, columns)
        if not path.exists():
            return table
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            header = tuple(reader.fieldnames or ())
            rows = list(reader) if header == table.columns else []
        if header != table.columns or any(None in row or None in row.values() for row in rows):
            raise RunError.single(
                "not a table of this run's predictions",
                where=str(path),
                remedy=f"its columns have to be {','.join(table.columns)}; give another --out",
            )
        table.rows = [row for row in rows if not row["error"]]
        return table

    @property
    def done(self) -> frozenset[str]:
        """Files that have a prediction."""
        return frozenset(row["file"] for row in self.rows if not row["error"])

    def add(self, row: Row) -> None:
        """Write one more row; columns that it lacks are empty.

        Raises:
            RunError: the disk is full; the rows before are still there.
        """
        self.rows.append({name: _text(row.get(name, "")) for name in self.columns})
        self.write()

    def write(self) -> None:
        """Replace the file.

        Raises:
            RunError: the disk is full, and the file is as it was.
        """
        lines = [csv_line(self.columns), *(csv_line([row[name] for name in self.columns]) for row in self.rows)]
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, "".join(lines).encode("utf-8", errors="surrogateescape"))


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)
