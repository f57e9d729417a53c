"""A manifest that is built from what an archive gives, and the files that are left out of it: none without a reason."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.cohort.files import SlideFolder
from wholeslide.errors import CohortError, Problem, SlideError
from wholeslide.slides.files import write_atomically
from wholeslide.slides.opening import open_slide

_EXCLUDED_COLUMNS = ("file", "reason", "detail")
"""``reason`` is one of a few, ``detail`` is of the file."""

NOT_THERE = "not in the folder of the slides"
AMBIGUOUS = "several slides of this name"
_NO_SCALE = "no magnification"
_UNREADABLE = "cannot be opened"
_NAMED_REASONS = 4


@dataclass(frozen=True)
class Assembly:
    """``table`` is a manifest (at least ``file, slide, patient, label``), ``excluded`` has the columns ``file, reason, detail``."""

    table: pd.DataFrame
    excluded: pd.DataFrame

    def without(self, excluded: Sequence[tuple[str, str, str]]) -> Assembly:
        """The same without some files, given with reason and detail."""
        gone = [file for file, _, _ in excluded]
        kept = self.table[~self.table["file"].isin(gone)].reset_index(drop=True)
        return Assembly(kept, pd.concat([self.excluded, excluded_table(excluded)], ignore_index=True))

    def check(self, source: str) -> None:
        """See that something is left.

        Raises:
            CohortError: nothing is; the most frequent reasons are named.
        """
        if not self.table.empty:
            return
        reasons = self.excluded["reason"].value_counts()
        named = ", ".join(f"{reason} {count}" for reason, count in reasons.head(_NAMED_REASONS).items())
        remedy = "see what is taken in docs/recipes.md"
        raise CohortError([Problem(f"no slide is left of {len(self.excluded)} files ({named})", source, remedy)])


def excluded_table(rows: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
    """Files with reason and detail, as a table."""
    return pd.DataFrame(rows, columns=list(_EXCLUDED_COLUMNS), dtype=object)


def excluded_path(manifest: Path) -> Path:
    """Where the excluded files of a manifest are listed: ``labels.csv`` has ``labels-excluded.csv`` beside it."""
    return manifest.with_name(f"{manifest.stem}-excluded.csv")


def write_assembly(assembly: Assembly, manifest: Path) -> None:
    """Write the manifest, and beside it the files that it leaves out.

    Raises:
        RunError: a file cannot be written.
    """
    for table, path in ((assembly.excluded, excluded_path(manifest)), (assembly.table, manifest)):
        with write_atomically(path) as beside:
            table.to_csv(beside, index=False, lineterminator="\n", encoding="utf-8")


def leave_out_unscaled(assembly: Assembly, slides_dir: Path) -> Assembly:
    """Without the slides that are not in a folder, cannot be opened, or tell no microns per pixel; headers are read only.

    Raises:
        CohortError: no such folder, or none of the slides is there.
    """
    if not slides_dir.is_dir():
        raise CohortError([Problem("no such folder", str(slides_dir), "give the folder of the slides with --slides")])
    folder = SlideFolder(slides_dir)
    found = [(file, folder.find(file)) for file in assembly.table["file"]]
    if not any(paths for _, paths in found):
        what = f"none of the {len(found)} slides is there, {found[0][0]} for one"
        raise CohortError([Problem(what, str(slides_dir), "give the folder that they were downloaded to")])
    excluded = []
    for file, paths in found:
        if len(paths) == 1:
            reason, detail = _scale_fault(paths[0])
        else:
            reason, detail = (AMBIGUOUS, ", ".join(map(str, paths))) if paths else (NOT_THERE, str(slides_dir))
        if reason:
            excluded.append((file, reason, detail))
    return assembly.without(excluded)


def _scale_fault(path: Path) -> tuple[str, str]:
    """Why a slide has no scale, with a detail; empty texts where it has one."""
    try:
        with closing(open_slide(path, fast=False)) as reader:
            if reader.l0_mpp is not None:
                return "", ""
    except SlideError as error:
        return _UNREADABLE, "; ".join(problem.what for problem in error.problems)
    return _NO_SCALE, "the file tells no microns per pixel"
