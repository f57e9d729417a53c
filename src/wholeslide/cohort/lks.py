"""The folder of the Liver-Kidney-Stomach data (LKS; Maksoud et al., SOS, CVPR 2020) → a manifest.

The script that its authors give (https://github.com/cradleai/LKS-Dataset, ``prepro_wsi.py``) tells the layout: images in
``Train/`` and ``Test/``, their classes in ``Train_Labels.csv`` and ``Test_Labels.csv``, each with a header, and the file's name and
its class in the first two columns. How the classes are spelled there is not known to us, so that ``Neg`` and ``SMA_V`` are taken,
too. Beside that layout, a table of one's own is taken, and a folder for each class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.cohort.assembly import AMBIGUOUS, NOT_THERE, Assembly, excluded_table
from wholeslide.cohort.files import SlideFolder, find_slides, slide_stem
from wholeslide.cohort.tables import read_text_table
from wholeslide.errors import CohortError, Problem, WholeslideError

_CLASSES = ("Negative", "AMA", "SMA-V", "SMA-T")

_NO_LABEL = "no label"
_UNKNOWN_CLASS = "unknown class"
_REPEATED = "twice in the tables"
_TWO_CLASSES = "labelled with two classes"

_CLASS_OF = {"negative": "Negative", "neg": "Negative", "ama": "AMA", "smav": "SMA-V", "smat": "SMA-T"}
_SPLIT_OF = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "test": "test"}
_LABEL_TABLE = re.compile(r"(train|test)_labels[.]csv", re.IGNORECASE)
_FILE_COLUMNS = ("file", "image", "filename", "file_name")
_LABEL_COLUMNS = ("label", "class")

_Excluded = list[tuple[str, str, str]]


@dataclass(frozen=True)
class _Row:
    """What is said of an image.

    ``file`` is its path below the folder, or elsewhere where a table says so; ``patient`` and ``split`` are "" if nothing is.
    """

    file: str
    label: str
    split: str
    patient: str = ""


def assemble_lks(folder: Path, labels: Path | None = None) -> Assembly:
    """The manifest of LKS's slides; the images that it leaves out are the excluded ones.

    The manifest has the columns ``file, slide, patient, label`` and, where tables or folders tell it, ``split``. LKS does not
    tell whose serum was on a slide: each slide counts as a patient, unless the table has a column ``patient``.

    Args:
        folder: where the images are.
        labels: a table with the columns ``image`` and ``label``, and where known ``split`` and ``patient``. Without it
            ``Train_Labels.csv`` and ``Test_Labels.csv`` in the folder are read; without those, folders are classes.

    Raises:
        CohortError: no such folder, everything that is wrong with the tables, or no slide is left.
    """
    if not folder.is_dir():
        raise CohortError([Problem("no such folder", str(folder), "give the folder of the images")])
    tables = label_tables(folder) if labels is None else [labels]
    rows, excluded = _from_tables(folder, tables) if tables else _from_folders(folder)
    known = [row for row in rows if _class_of(row.label)]
    excluded += [
        (row.file, _UNKNOWN_CLASS, f"{row.label!r} is none of {', '.join(_CLASSES)}")
        for row in rows
        if not _class_of(row.label)
    ]
    assembly = Assembly(_manifest(known), excluded_table(excluded))
    assembly.check(str(folder))
    return assembly


def label_tables(folder: Path) -> list[Path]:
    """``Train_Labels.csv`` and ``Test_Labels.csv``, as far as they are in the folder."""
    return sorted(path for path in folder.iterdir() if _LABEL_TABLE.fullmatch(path.name)) if folder.is_dir() else []


def _class_of(label: str) -> str:
    """The class as the paper writes it; "" if it is none of the four."""
    return _CLASS_OF.get(re.sub(r"[^a-z0-9]", "", label.lower()), "")


def _from_folders(folder: Path) -> tuple[list[_Row], _Excluded]:
    """The nearest folder above an image that is named like a class is its class; one named train or test is its split."""
    rows: list[_Row] = []
    excluded: _Excluded = []
    for path in find_slides(folder):
        inside = path.relative_to(folder)
        above = [part.lower() for part in reversed(inside.parts[:-1])]
        label = next((part for part in above if _class_of(part)), "")
        split = next((_SPLIT_OF[part] for part in above if part in _SPLIT_OF), "")
        if label:
            rows.append(_Row(inside.as_posix(), label, split))
        else:
            excluded.append((inside.as_posix(), _NO_LABEL, f"in no folder named {', '.join(_CLASSES)}"))
    return rows, excluded


def _from_tables(folder: Path, tables: Sequence[Path]) -> tuple[list[_Row], _Excluded]:
    """What the tables say, each image once, and the images that they do not name.

    Raises:
        CohortError: everything that is wrong with the tables.
    """
    problems: list[Problem] = []
    written: list[_Row] = []
    for table in tables:
        try:
            written += _read_labels(table)
        except WholeslideError as error:
            problems += error.problems
    if problems:
        raise CohortError(problems)
    slides = SlideFolder(folder)
    by_path: dict[Path, list[_Row]] = {}
    excluded: _Excluded = []
    for row in written:
        paths = slides.find(Path(row.split, row.file).as_posix()) or slides.find(row.file)
        if len(paths) == 1:
            by_path.setdefault(paths[0], []).append(row)
        else:
            detail = ", ".join(str(path.relative_to(folder)) for path in paths)
            excluded.append((row.file, AMBIGUOUS, detail) if paths else (row.file, NOT_THERE, str(folder)))
    rows: list[_Row] = []
    for path, said in by_path.items():
        file = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        classes = dict.fromkeys(_class_of(row.label) or row.label for row in said)
        if len(classes) > 1:
            excluded.append((file, _TWO_CLASSES, " and ".join(classes)))
            continue
        rows.append(_Row(file, said[0].label, said[0].split, said[0].patient))
        excluded += [(row.file, _REPEATED, f"kept: {file}") for row in said[1:]]
    ambiguous = {path for row in written for path in slides.find(row.file)}
    unnamed = [path for path in find_slides(folder) if path not in by_path and path not in ambiguous]
    listed = ", ".join(table.name for table in tables)
    excluded += [(path.relative_to(folder).as_posix(), _NO_LABEL, f"not in {listed}") for path in unnamed]
    return rows, excluded


def _read_labels(path: Path) -> list[_Row]:
    """The rows of one table; files are as it names them.

    Raises:
        CohortError: the table cannot be read, or has one column only.
    """
    table = read_text_table(path)
    by_lower = {name.casefold(): name for name in table.columns}
    if len(table.columns) < 2:
        raise CohortError([Problem("one column only", str(path), "give the columns image and label")])
    file = next((by_lower[name] for name in _FILE_COLUMNS if name in by_lower), table.columns[0])
    label = next((by_lower[name] for name in _LABEL_COLUMNS if name in by_lower), table.columns[1])
    match = _LABEL_TABLE.fullmatch(path.name)
    split = match[1].lower() if match else ""
    splits = table[by_lower["split"]] if "split" in by_lower else pd.Series(split, index=table.index)
    patients = table[by_lower["patient"]] if "patient" in by_lower else pd.Series("", index=table.index)
    problems = [
        Problem("no file", f"{path.name} line {line}", "name the image, or remove the row")
        for line, name in table[file].items()
        if not name
    ]
    problems += [
        Problem(f"unknown split {name!r}", f"{path.name} line {line}", "write train, valid or test")
        for line, name in splits.items()
        if name and name.lower() not in _SPLIT_OF
    ]
    if problems:
        raise CohortError(problems)
    return [
        _Row(*cells)
        for cells in zip(table[file], table[label], splits.str.lower().map(_SPLIT_OF).fillna(""), patients, strict=True)
    ]


def _manifest(rows: Sequence[_Row]) -> pd.DataFrame:
    """One row an image. A slide is named by its stem, or by its path where a stem occurs twice."""
    rows = sorted(rows, key=lambda row: row.file)
    stems = [slide_stem(row.file) for row in rows]
    slides = [stem if stems.count(stem) == 1 else row.file for stem, row in zip(stems, rows, strict=True)]
    table = pd.DataFrame(
        {
            "file": [row.file for row in rows],
            "slide": slides,
            "patient": [row.patient or slide for row, slide in zip(rows, slides, strict=True)],
            "label": [_class_of(row.label) for row in rows],
        },
        dtype=object,
    )
    if any(row.split for row in rows):
        table["split"] = [row.split for row in rows]
    return table
