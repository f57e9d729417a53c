"""A table of predictions and, beside it, what it was made with, so that only its own rows are gone on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.errors import Problem, RunError, option
from wholeslide.predict.table import PredictionTable, Row
from wholeslide.slides.config import SlideConfig
from wholeslide.train.checkpoint import check_format, disk_errors, write_atomically
from wholeslide.train.run import Run

FORMAT_VERSION = 1


@dataclass(frozen=True)
class MadeWith:
    """What every row of a table has in common: the checkpoint's hash, and by option how slides are read."""

    checkpoint: str
    reading: dict[str, str]

    @classmethod
    def of(cls, run: Run, slide_config: SlideConfig) -> MadeWith:
        """What predictions of a run's best checkpoint are made with.

        Raises:
            RunError: there is no checkpoint, or its record is damaged.
        """
        options = {field.name: str(getattr(slide_config, field.name)) for field in dataclasses.fields(slide_config)}
        return cls(run.checkpoints.pointer("best").sha256, options)


class PredictionOutput:
    """``table`` and its record: ``made_with``, and in ``slides`` the path, links followed, of every file it names."""

    def __init__(self, table: PredictionTable, made_with: MadeWith, slides: dict[str, str]) -> None:
        self.table = table
        self.made_with = made_with
        self.slides = slides

    @classmethod
    def open(cls, path: Path, columns: Sequence[str], made_with: MadeWith, *, resume: bool) -> PredictionOutput:
        """A new table, or with ``resume`` the one that is there; nothing is written yet.

        Raises:
            RunError: the file exists and is not resumed; it is no such table, or was not made with the same.
        """
        if not resume or not path.exists():
            return cls(PredictionTable.create(path, columns), made_with, {})
        table = PredictionTable.resume(path, columns)
        return cls(table, made_with, _recorded_slides(table, made_with))

    def lacking(self, slides: pd.DataFrame) -> pd.DataFrame:
        """The slides that have no prediction yet; the others are told by their paths, not by their names.

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
        named = slides.assign(file=pd.Series(names, index=slides.index, dtype=object))
        return named[~named["file"].isin(self.table.done)].reset_index(drop=True)

    def begin(self) -> None:
        """Write the record, then the table as it is.

        Raises:
            RunError: the disk is full.
        """
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.made_with), "slides": self.slides}
        path = record_path(self.table.path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content, indent=2).encode())
        self.table.write()

    def add(self, row: Row) -> None:
        """Write one more row.

        Raises:
            RunError: the disk is full; the rows before are still there.
        """
        self.table.add(row)


def record_path(table: Path) -> Path:
    """Where it is kept what a table was made with."""
    return table.with_name(f"{table.name}.made-with.json")


def _recorded_slides(table: PredictionTable, made_with: MadeWith) -> dict[str, str]:
    """The slides of a table that was made with the same.

    Raises:
        RunError: it was not, or there is no telling.
    """
    path = record_path(table.path)
    if not path.exists():
        raise RunError.single(
            "nothing tells what the predictions in this file were made with",
            where=str(table.path),
            remedy=f"put {path.name} back beside it, or give another --out",
        )
    try:
        values = json.loads(path.read_bytes())
        check_format(values["format_version"], path)
        recorded = MadeWith(values["checkpoint"], dict(values["reading"]))
        slides = {str(file): str(slide) for file, slide in values["slides"].items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _not_its_record(path) from error
    problems = _differences(recorded, made_with, table.path)
    if problems:
        raise RunError(problems)
    if table.done - slides.keys():
        raise _not_its_record(path)
    return slides


def _differences(recorded: MadeWith, now: MadeWith, table: Path) -> list[Problem]:
    if recorded.checkpoint != now.checkpoint:
        what = "the predictions in this file were made with another checkpoint"
        return [Problem(what, str(table), "give the run that made them, as it was then, or another --out")]
    return [
        Problem(
            f"the predictions in this file were made with {option(name)} {recorded.reading.get(name)}, not {value}",
            str(table),
            "go on with the options that it was begun with, or give another --out",
        )
        for name, value in now.reading.items()
        if recorded.reading.get(name) != value
    ]


def _not_its_record(path: Path) -> RunError:
    return RunError.single(
        "this is damaged, or the record of another table",
        where=str(path),
        remedy="put back the one that was written with the table, or give another --out",
    )
