"""A table of predictions and, beside it, what it was made with, so that only its own rows are gone on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.errors import Problem, RunError, option
from wholeslide.predict.table import Row, RowWriter, read_rows, write_rows
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.files import left_parts
from wholeslide.train.checkpoint import check_format, disk_errors, write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MadeWith:
    """What every row of a table has in common: the checkpoint's hash, by option how slides are read, and the hash of 8-bit ranges.

    Where their files are decoded is not among the options: the pixels are the same.
    """

    checkpoint: str
    reading: dict[str, str]
    calibration: str | None = None

    @classmethod
    def of(
        cls,
        checkpoint: str,
        slide_config: SlideConfig,
        *,
        precision: str | None = None,
        compiled: bool = False,
        calibration: str | None = None,
    ) -> MadeWith:
        """What predictions of a checkpoint of this hash are made with, and with a calibration of this hash, if any."""
        names = [field.name for field in dataclasses.fields(slide_config) if field.name != "decoders"]
        options = {name: str(getattr(slide_config, name)) for name in names}
        options |= {"precision": str(precision), "compile": str(compiled)}
        return cls(checkpoint, options, calibration)


class PredictionOutput:
    """A table of predictions at ``path`` and its record, as one process, and only one, holds them.

    ``rows`` are the predictions that were known before. ``slides`` has the path, links followed, of every file that the
    table names. From `begin` to `finish` the rows that come are added by `row_writer`, and stand where it says; `finish`
    puts them into their final order.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        made_with: MadeWith,
        rows: list[dict[str, str]],
        slides: dict[str, str],
    ) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.made_with = made_with
        self.rows = rows
        self.slides = slides

    @classmethod
    def open(cls, path: Path, columns: Sequence[str], made_with: MadeWith, *, resume: bool) -> PredictionOutput:
        """A new table, or with ``resume`` the one that is there; nothing is written yet.

        A table that was left unfinished includes the rows of all the processes that wrote it, however many they were.
        Slides that could not be read are dropped, to be tried again.

        Raises:
            RunError: the file exists and is not resumed; it is no such table, or was not made with the same; a process
                still adds to it.
        """
        found = [*([path] if path.exists() else []), *_unfinished(path)]
        if not found:
            return cls(path, columns, made_with, [], {})
        if not resume:
            raise RunError.single(
                "the file exists", where=str(found[0]), remedy="add --resume to go on with it, or give another --out"
            )
        for part in _unfinished(path):
            RowWriter(part, columns).close()  # refused while a process that outlived the others adds to it
        rows = {row["file"]: row for part in found for row in read_rows(part, columns) if not row["error"]}
        slides = _recorded_slides(path, made_with, rows.keys())
        return cls(path, columns, made_with, list(rows.values()), slides)

    @property
    def done(self) -> dict[str, dict[str, str]]:
        """The predictions known before, by file."""
        return {row["file"]: row for row in self.rows}

    def named(self, slides: pd.DataFrame) -> pd.DataFrame:
        """The slides by the names that they have in the table: they are told apart by their paths.

        A slide that the table knows keeps the name that it has there. One whose name is another's there is named by
        its path.
        """
        paths = slides["path"].map(lambda path: str(Path(path).resolve()))
        known = {path: file for file, path in self.slides.items()}
        names = [
            known.get(path) or (file if self.slides.get(file, path) == path else path)
            for file, path in zip(slides["file"], paths, strict=True)
        ]
        self.slides |= dict(zip(names, paths, strict=True))
        return slides.assign(file=pd.Series(names, index=slides.index, dtype=object))

    def begin(self) -> None:
        """Write the record, then the table as it is known.

        Raises:
            RunError: the disk is full.
        """
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.made_with), "slides": self.slides}
        path = record_path(self.path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=2).encode())
        self._write(self.rows)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the table with these rows in this order, behind those of slides that nobody asked for this time.

        Raises:
            RunError: the disk is full; every row is still where it was added.
        """
        asked = {row["file"] for row in rows}
        self._write([*(row for row in self.rows if row["file"] not in asked), *rows])

    def _write(self, rows: Sequence[Row]) -> None:
        """The table first: whatever moment a kill strikes, each row is in it or beside it, or in both."""
        write_rows(self.path, self.columns, rows)
        folder = _rows_folder(self.path)
        killed = [*folder.glob("*.csv.part"), *left_parts(self.path), *left_parts(record_path(self.path))]
        for part in [*_unfinished(self.path), *killed]:
            part.unlink()
        with suppress(OSError):  # there is none, or another's file is in it
            folder.rmdir()


@contextmanager
def row_writer(table: Path, columns: Sequence[str], *, rank: int, processes: int) -> Iterator[RowWriter]:
    """Where a process adds its rows: one alone to the table itself, each of several to ``<table>.rows/<rank>.csv``.

    Raises:
        RunError: another process is adding to it; the disk is full.
    """
    path = table
    if processes > 1:
        path = _rows_folder(table) / f"{rank}.csv"
        write_rows(path, columns, [])
    with closing(RowWriter(path, columns)) as writer:
        yield writer


def _rows_folder(table: Path) -> Path:
    return table.with_name(f"{table.name}.rows")


def _unfinished(table: Path) -> list[Path]:
    """The files that several processes left, each with its own rows."""
    return sorted(_rows_folder(table).glob("*.csv"))


def record_path(table: Path) -> Path:
    """Where it is kept what a table was made with."""
    return table.with_name(f"{table.name}.made-with.json")


def _recorded_slides(table: Path, made_with: MadeWith, files: Collection[str]) -> dict[str, str]:
    """The slides of a table with predictions for ``files`` that was made with the same.

    Raises:
        RunError: it was not, or there is no telling.
    """
    path = record_path(table)
    if not path.exists():
        raise RunError.single(
            "nothing tells what the predictions in this file were made with",
            where=str(table),
            remedy=f"put {path.name} back beside it, or give another --out",
        )
    try:
        values = json.loads(path.read_bytes())
        check_format(values["format_version"], path)
        recorded = MadeWith(values["checkpoint"], dict(values["reading"]), values.get("calibration"))
        slides = {str(file): str(slide) for file, slide in values["slides"].items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _not_its_record(path) from error
    problems = _differences(recorded, made_with, table)
    if problems:
        raise RunError(problems)
    if set(files) - slides.keys():
        raise _not_its_record(path)
    return slides


def _differences(recorded: MadeWith, now: MadeWith, table: Path) -> list[Problem]:
    if recorded.checkpoint != now.checkpoint:
        what = "the predictions in this file were made with another checkpoint"
        return [Problem(what, str(table), "give the run that made them, as it was then, or another --out")]
    others = [
        Problem(
            f"the predictions in this file were made with {option(name)} {recorded.reading.get(name)}, not {value}",
            str(table),
            "go on with the options that it was begun with, or give another --out",
        )
        for name, value in now.reading.items()
        if recorded.reading.get(name) != value
    ]
    if not others and recorded.calibration != now.calibration:
        what = "the predictions in this file were made with other ranges of 8-bit numbers"
        others = [Problem(what, str(table), "put back the run's calibration.safetensors, or give another --out")]
    return others


def _not_its_record(path: Path) -> RunError:
    return RunError.single(
        "this is damaged, or the record of another table",
        where=str(path),
        remedy="put back the one that was written with the table, or give another --out",
    )
