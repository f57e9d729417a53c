"""What a table of files, labels and splits must not hold; nothing here opens a file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import pandas as pd

from wholeslide.cohort.config import SPLITS
from wholeslide.errors import Problem

_SPLIT_WORDS = {"train": "training", "valid": "validation", "test": "test"}
_LISTED_FILES = 4
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def split_problems(table: pd.DataFrame, *, group: str = "patient") -> list[Problem]:
    """A patient, a group or a path on both sides of a split, and a slide of two patients."""
    columns = dict.fromkeys(("patient", group))
    crossing = [problem for column in columns for problem in _crossing(table, column)]
    return [*_repeated_paths(table), *crossing, *_slides_of_two_patients(table)]


def label_problems(table: pd.DataFrame, *, classes: Sequence[str] | None = None) -> list[Problem]:
    """Missing and unknown labels, labels that differ in case only, one class only, a class that a split lacks.

    ``classes`` are those that a trained run knows; without it every label is known.
    """
    problems = [
        Problem("no label", str(file), "give the label or remove the row")
        for file in table.loc[table["label"] == "", "file"]
    ]
    labels = sorted(set(table["label"]) - {""})
    if classes is not None:
        unknown = table[~table["label"].isin([*classes, ""])]
        problems += [
            Problem(f"unknown label {label!r}", str(file), f"use one of {', '.join(classes)}")
            for file, label in zip(unknown["file"], unknown["label"], strict=True)
        ]
        return problems
    spellings = defaultdict[str, list[str]](list)
    for label in labels:
        spellings[label.casefold()].append(label)
    problems += [
        Problem("labels differ only in case", ", ".join(same), "write them alike")
        for same in spellings.values()
        if len(same) > 1
    ]
    if len(labels) < 2:
        only = f"one class only, {labels[0]!r}" if labels else "no class at all"
        problems.append(Problem(only, "column 'label'", "give files of at least two classes"))
    return [*problems, *_empty_classes(table, labels)]


def same_number_problems(labels: pd.Series, where: str) -> list[Problem]:
    """Labels such as ``1``, ``01`` and ``1.0``, as a spreadsheet or a data frame leaves them."""
    spellings = defaultdict[Decimal, list[str]](list)
    for label in labels.unique():
        if _NUMBER.fullmatch(label):
            spellings[Decimal(label)].append(label)
    return [
        Problem(f"the labels {', '.join(map(repr, same))} are one number", where, "write them alike")
        for same in spellings.values()
        if len(same) > 1
    ]


def unit_problems(table: pd.DataFrame, unit: str) -> list[Problem]:
    """Patients or slides whose files are labelled differently cannot be what the metrics count."""
    if unit not in ("patient", "slide"):
        return []
    labels = table[table["label"] != ""].groupby(unit)["label"].agg(lambda names: sorted(set(names)))
    return [
        Problem(f"files labelled {' and '.join(found)}", f"{unit} {name}", "score each file by itself: --unit file")
        for name, found in labels.items()
        if len(found) > 1
    ]


def group_problems(table: pd.DataFrame, group: str) -> list[Problem]:
    """A column to group by that is not there, or has gaps."""
    if group not in table:
        usable = [name for name in table.columns if name not in ("file", "path", "label", "split", "mpp")]
        return [Problem(f"no column {group!r}", "--group", f"use one of {', '.join(usable)}")]
    return [
        Problem(f"no {group}", str(file), f"fill the column {group!r} in each row")
        for file in table.loc[table[group].astype(str) == "", "file"]
    ]


def name_files(files: pd.Series | Sequence[str]) -> str:
    """The first few files, and how many more."""
    names = [str(file) for file in files]
    more = len(names) - _LISTED_FILES
    return ", ".join(names[:_LISTED_FILES]) + (f" and {more} more" if more > 0 else "")


def _part_columns(table: pd.DataFrame) -> list[str]:
    return [column for column in ("split", "fold") if column in table]


def _crossing(table: pd.DataFrame, column: str) -> Iterator[Problem]:
    for parts in _part_columns(table):
        placed = table[(table[parts].astype(str) != "") & (table[column].astype(str) != "")]
        counts = placed.groupby(column)[parts].nunique()
        for value in counts.index[counts > 1]:
            rows = placed[placed[column] == value]
            names = " and ".join(_in_order({str(part) for part in rows[parts]}))
            one_each = rows.drop_duplicates(parts)["file"]
            remedy = f"put all files of the {column} in one {parts}"
            yield Problem(f"{column} {value!r} is in {parts} {names}", name_files(one_each), remedy)


def _repeated_paths(table: pd.DataFrame) -> Iterator[Problem]:
    """The same file in two rows, links followed: in two splits it leaks, in one it counts double."""
    resolved = table[table["path"] != ""]
    files = resolved["path"].map(lambda path: str(Path(path).resolve()))
    for path, rows in resolved[files.duplicated(keep=False)].groupby(files):
        splits = _in_order(set(rows["split"]) - {""})
        where = f" in {' and '.join(splits)}" if splits else ""
        names = name_files(rows["file"].drop_duplicates())
        yield Problem(f"the same file in {len(rows)} rows{where}", f"{names}: {path}", "keep one row")


def _slides_of_two_patients(table: pd.DataFrame) -> Iterator[Problem]:
    patients = table.groupby("slide")["patient"].nunique()
    for slide in patients.index[patients > 1]:
        rows = table[table["slide"] == slide]
        names = ", ".join(sorted(set(rows["patient"])))
        yield Problem(f"slide {slide!r} has patients {names}", name_files(rows["file"]), "give each slide one patient")


def _empty_classes(table: pd.DataFrame, labels: Sequence[str]) -> Iterator[Problem]:
    """Once there are splits, training and validation need every class, and so does a test split that exists."""
    if not (table["split"] != "").any():
        return
    for split in SPLITS:
        rows = table[table["split"] == split]
        word = _SPLIT_WORDS[split]
        if rows.empty and split != "test":
            yield Problem(f"no {word} file", "column 'split'", f"put files of every class into {split!r}")
        elif not rows.empty:
            for label in sorted(set(labels) - set(rows["label"])):
                remedy = f"put files of the class into {split!r}, or remove the class"
                yield Problem(f"class {label!r} has no {word} file", "column 'split'", remedy)


def _in_order(parts: set[str]) -> list[str]:
    return sorted(parts, key=lambda part: (SPLITS.index(part) if part in SPLITS else len(SPLITS), part))
