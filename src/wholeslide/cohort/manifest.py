"""A manifest and a folder → a `Cohort`: one row a file, each resolved to exactly one slide.

Forms that are taken as they are: our own (``file, slide, patient, label, site, split, fold, mpp``), the paper's
(``slide_id,label,type``) and CLAM's (``case_id,slide_id,label`` with its ``splits_k.csv``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.cohort.checks import same_number_problems, split_problems
from wholeslide.cohort.files import SlideFolder, find_slides, other_suffixes, slide_stem, tcga_patient
from wholeslide.cohort.tables import read_text_table
from wholeslide.errors import CohortError, Problem
from wholeslide.slides.config import LARGEST_MPP, SMALLEST_MPP

logger = logging.getLogger(__name__)

COLUMNS = ("file", "path", "slide", "patient", "label", "split", "mpp")
"""The columns that every cohort has, in this order, before the manifest's others."""

_ALIASES = {
    "file": ("file", "image", "filename", "file_name"),
    "slide": ("slide", "slide_id"),
    "patient": ("patient", "patient_id", "case_id", "case"),
    "label": ("label",),
    "split": ("split",),
    "fold": ("fold",),
    "mpp": ("mpp",),
}
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "validate", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {alias: name for name, aliases in _SPLIT_NAMES.items() for alias in aliases}
_MISSING_LABELS = frozenset({"", "na", "n/a", "#n/a", "nan", "<na>", "null", "?", "unknown"})
_LISTED_UNRESOLVED = 20


@dataclass(frozen=True)
class Cohort:
    """Files with their slides, patients, labels and splits.

    ``table`` has a row for each file and the columns of `COLUMNS`, then the manifest's others: ``file`` as the manifest
    names it, ``path`` resolved ("" where no folder was given), ``label`` "" where unlabelled, ``split`` one of
    ``train``, ``valid``, ``test`` or "", ``mpp`` in µm per pixel or NaN. Everything but ``mpp`` is text, so that the id
    ``007`` stays itself.
    ``classes`` are sorted, whole numbers by value.
    """

    table: pd.DataFrame
    classes: tuple[str, ...]
    slides_dir: Path

    def split(self, name: str) -> pd.DataFrame:
        """The rows of one split."""
        return self.table[self.table["split"] == name]

    @property
    def has_splits(self) -> bool:
        return bool((self.table["split"] != "").any())


def sorted_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels that are not empty: by value where all are whole numbers, otherwise by letter."""
    names = sorted({label for label in labels if label})
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names):
        names.sort(key=int)
    return tuple(names)


def read_cohort(
    manifest: Path,
    slides_dir: Path | None = None,
    *,
    labelled: bool = True,
    splits_csv: Path | None = None,
    keep_missing: bool = False,
) -> Cohort:
    """Read a manifest and resolve each row to one slide below ``slides_dir``.

    Without ``slides_dir`` nothing is looked up and ``path`` is empty (enough to draw a split). With ``labelled`` each
    row needs a label; without it, labels may be missing, as for prediction. ``splits_csv`` is CLAM's table of slide
    names under ``train,val,test``; rows that it does not name are left out. With ``keep_missing`` the ``path`` of a file that
    is not there is where it should be, unless none is there: whoever opens it meets the error.

    Raises:
        CohortError: everything that is wrong with the manifest and the names in it, together.
    """
    raw = read_text_table(manifest)
    rows = _Rows(manifest.name, _canonical(raw, manifest), decimal_comma=raw.attrs["separator"] == ";")
    if slides_dir is not None and not slides_dir.is_dir():
        rows.problems.append(Problem("no such folder", str(slides_dir), "give the folder of the slides with --slides"))
        slides_dir = None
    rows.fill_names()
    rows.fill_labels(required=labelled)
    rows.fill_splits(required=labelled)
    rows.fill_mpp()
    if splits_csv is not None:
        rows.take_splits(read_text_table(splits_csv), splits_csv)
    rows.resolve(slides_dir, keep_missing=keep_missing)
    if rows.problems:
        raise CohortError([*rows.problems, *(split_problems(rows.table) if labelled else ())])
    return rows.cohort(slides_dir)


def cohort_from_files(paths: Sequence[Path]) -> Cohort:
    """Unlabelled slides for prediction: files, DICOM folders, and folders that are searched for slides.

    ``file`` is the path as given (joined with what was found below it). A slide is named by its stem, or by its path
    where a stem occurs twice.

    Raises:
        CohortError: a path that does not exist, a folder without slides.
    """
    problems: list[Problem] = []
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            slides = [path]
        elif path.is_dir():
            slides = find_slides(path)
            _tell_what_is_passed_over(path)
            if not slides:
                problems.append(Problem("no slides found", str(path), "give a folder with slides, or the files"))
        else:
            slides = []
            problems.append(Problem("no such slide or folder", str(path), "check the path"))
        for slide in slides:
            found.setdefault(slide.resolve(), slide)
    if not paths:
        problems.append(Problem("nothing to predict", "command line", "give slides, a folder or a manifest"))
    if problems:
        raise CohortError(problems)
    files = [str(path) for path in found.values()]
    stems = pd.Series([slide_stem(name) for name in files], dtype=object)
    names = stems.where(~stems.duplicated(keep=False), pd.Series(files, dtype=object))
    table = pd.DataFrame({"file": files, "path": [str(path) for path in found], "slide": names, "patient": names})
    table = table.assign(label="", split="", mpp=math.nan)
    return Cohort(table=table.loc[:, list(COLUMNS)], classes=(), slides_dir=Path())


def _tell_what_is_passed_over(folder: Path) -> None:
    counts = other_suffixes(folder)
    if counts:
        listed = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in sorted(counts.items()))
        logger.info("%s: %d files of other kinds are passed over (%s)", folder, counts.total(), listed)


def _canonical(raw: pd.DataFrame, manifest: Path) -> pd.DataFrame:
    """The manifest's table with our names for the columns we know; others stay as they are."""
    by_lower = {name.casefold(): name for name in raw.columns}
    table = raw.copy()
    for ours, aliases in _ALIASES.items():
        theirs = next((by_lower[alias] for alias in aliases if alias in by_lower), None)
        if theirs is None:
            continue
        if theirs.casefold() == ours:
            table = table.rename(columns={theirs: ours})
        else:
            table[ours] = table[theirs]
    kind = by_lower.get("type")
    if kind is not None and "split" not in table and set(table[kind].str.lower()) <= {*_SPLIT_OF, ""}:
        table = table.rename(columns={kind: "split"})
    if "file" not in table and "slide" not in table:
        remedy = "give a column 'file' (or 'image', 'slide', 'slide_id') with the name of each slide"
        raise CohortError(
            [Problem(f"no column names the slides, only {', '.join(raw.columns)}", str(manifest), remedy)]
        )
    return table.drop(columns=[name for name in table.columns if name.casefold() == "path"])


class _Rows:
    """A manifest's rows while they are checked; what is wrong collects in ``problems``."""

    def __init__(self, name: str, table: pd.DataFrame, *, decimal_comma: bool) -> None:
        self.name = name
        self.table = table
        self.problems: list[Problem] = []
        self._decimal_comma = decimal_comma

    def where(self, line: int) -> str:
        shown = self.table["file"][line] if "file" in self.table else ""
        return f"{self.name} line {line}" + (f": {shown}" if shown else "")

    def complain(self, lines: Iterable[int], what: str | Callable[[int], str], remedy: str) -> None:
        for line in lines:
            self.problems.append(Problem(what if isinstance(what, str) else what(line), self.where(line), remedy))

    def fill_names(self) -> None:
        """``file``, ``slide`` and ``patient``, each from the one before where the manifest has no such column."""
        table = self.table
        if "file" not in table:
            table["file"] = table["slide"]
        self.complain(table.index[table["file"] == ""], "no file", "name the slide's file, or remove the row")
        returns = table["file"].str.replace("\r\n", "\n", regex=False).str.contains("\r", regex=False)
        self.complain(
            table.index[returns], "a carriage return in the name, which CSV files do not keep", "rename the file"
        )
        stems = table["file"].map(slide_stem)
        if "slide" not in table:
            table["slide"] = stems
            files_of_stem = table.groupby("slide")["file"].nunique()
            same = table.index[table["slide"].map(files_of_stem).gt(1) & table["slide"].ne("")]
            self.complain(
                same,
                lambda line: f"several files have the stem {table['slide'][line]!r}, so they would count as one slide",
                "add a column 'slide' that tells them apart",
            )
        table["slide"] = table["slide"].where(table["slide"] != "", stems)
        if "patient" not in table:
            table["patient"] = table["slide"]
            _advise_on_patients(table["slide"])
        empty = table.index[table["patient"] == ""]
        self.complain(empty, "no patient", "name the patient in each row, or remove the column")

    def fill_labels(self, *, required: bool) -> None:
        """Labels as text, "" where missing. ``1`` and ``1.0`` would be two classes, and never are meant as two."""
        if "label" not in self.table:
            self.table["label"] = ""
            if required:
                self.problems.append(Problem("no column 'label'", self.name, "add one with each file's class"))
            return
        labels = self.table["label"]
        missing = labels.str.lower().isin(_MISSING_LABELS)
        if required:
            self.complain(
                self.table.index[missing],
                lambda line: f"the label {labels[line]!r} reads as missing" if labels[line] else "no label",
                "give the label or remove the row",
            )
            self.problems += same_number_problems(labels, self.name)
        self.table["label"] = labels.where(~missing, "")

    def fill_splits(self, *, required: bool) -> None:
        """``train``, ``valid`` or ``test``; "" throughout where the manifest has no split."""
        if "split" not in self.table:
            self.table["split"] = ""
            return
        written = self.table["split"]
        splits = written.str.lower().map(_SPLIT_OF).fillna("")
        unknown = self.table.index[(splits == "") & (written != "")]
        self.complain(unknown, lambda line: f"unknown split {written[line]!r}", "write train, valid or test")
        if required and (written != "").any():
            self.complain(
                self.table.index[written == ""], "no split", "write train, valid or test in each row, or in none"
            )
        self.table["split"] = splits

    def fill_mpp(self) -> None:
        """Microns per pixel as a number, NaN where not given."""
        if "mpp" not in self.table:
            self.table["mpp"] = math.nan
            return
        written = self.table["mpp"]
        plain = written.str.replace(",", ".", regex=False) if self._decimal_comma else written
        values = pd.to_numeric(plain.where(plain != "", "nan"), errors="coerce").astype(float)
        wrong = self.table.index[(written != "") & ~values.between(SMALLEST_MPP, LARGEST_MPP)]
        self.complain(
            wrong,
            lambda line: f"the mpp {written[line]!r} is no number from {SMALLEST_MPP:g} to {LARGEST_MPP:g}",
            "give µm per pixel of the stored image, or leave the cell empty to use the file's own",
        )
        self.table["mpp"] = values

    def take_splits(self, lists: pd.DataFrame, path: Path) -> None:
        """CLAM's ``splits_k.csv``: a column a split, each a list of slide names."""
        columns = {_SPLIT_OF[name.lower()]: lists[name] for name in lists.columns if name.lower() in _SPLIT_OF}
        if "train" not in columns:
            self.problems.append(Problem("no columns train, val, test", str(path), "give CLAM's splits_k.csv"))
            return
        known = set(self.table["slide"])
        split_of: dict[str, str] = {}
        for split, cells in columns.items():
            for line, name in cells.items():
                slide = name if name in known else name.removesuffix(".0")  # a data frame's column with gaps
                where = f"{path.name} line {line}: {name}"
                if name and slide not in known:
                    self.problems.append(Problem("no such slide in the manifest", where, "add it or take it out"))
                elif name and split_of.setdefault(slide, split) != split:
                    self.problems.append(Problem(f"slide in {split_of[slide]} and {split}", where, "keep one"))
        self.table["split"] = self.table["slide"].map(split_of).fillna("")
        unused = self.table["split"] == ""
        if unused.any():
            logger.warning("%d of %d rows are in no split of %s and are left out", unused.sum(), len(unused), path.name)
            self.table = self.table[~unused].copy()

    def resolve(self, slides_dir: Path | None, *, keep_missing: bool) -> None:
        """``path``: the one slide that each ``file`` means; see `read_cohort` for ``keep_missing``."""
        if slides_dir is None:
            self.table["path"] = ""
            return
        folder = SlideFolder(slides_dir)
        candidates = {name: folder.find(name) for name in self.table["file"].unique() if name}
        lost = [name for name, paths in candidates.items() if not paths]
        if lost and len(lost) == len(candidates) and (keep_missing or len(lost) > _LISTED_UNRESOLVED):
            what = f"none of the {len(lost)} files of {self.name} is there, {lost[0]} for one"
            self.problems.append(Problem(what, str(slides_dir), "give the folder of the slides with --slides"))
        else:
            if keep_missing:
                candidates |= {name: (slides_dir / name,) for name in lost}
            for line, name in zip(self.table.index, self.table["file"], strict=True):
                if name and len(candidates[name]) != 1:
                    self.problems.append(_unresolved(folder, name, candidates[name], self.where(line)))
        self.table["path"] = [
            str(candidates[name][0].absolute()) if name and len(candidates[name]) == 1 else ""
            for name in self.table["file"]
        ]

    def cohort(self, slides_dir: Path | None) -> Cohort:
        others = [name for name in self.table.columns if name not in COLUMNS]
        table = self.table.loc[:, [*COLUMNS, *others]].reset_index(drop=True)
        table.attrs.clear()
        return Cohort(table=table, classes=sorted_classes(table["label"]), slides_dir=slides_dir or Path())


def _unresolved(folder: SlideFolder, name: str, candidates: Sequence[Path], where: str) -> Problem:
    if candidates:
        listed = ", ".join(str(path.relative_to(folder.root)) for path in candidates)
        return Problem(f"{name!r} may be any of {listed}", where, "write the path below the folder of the slides")
    similar = folder.similar(name)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "correct the name or remove the row"
    return Problem(f"no such slide among the {len(folder)} in {folder.root}", where, hint)


def _advise_on_patients(slides: pd.Series) -> None:
    """Slides of one TCGA participant are told apart by nothing but the barcode: say that they would be split."""
    patients = slides.map(tcga_patient)
    if patients.notna().all() and patients.nunique() < len(set(slides)):
        logger.warning(
            "%d slides come from %d TCGA patients, but there is no column 'patient': each slide counts as a patient",
            len(set(slides)),
            patients.nunique(),
        )
