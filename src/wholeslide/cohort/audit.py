"""The audit that stops a run before it trains on something it must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from wholeslide.cohort.checks import group_problems, label_problems, name_files, split_problems, unit_problems
from wholeslide.cohort.duplicates import same_content
from wholeslide.cohort.manifest import Cohort
from wholeslide.errors import CohortError, Problem, WholeslideError


def audit(
    cohort: Cohort,
    *,
    group: str = "patient",
    open_check: Callable[[Path], None] | None = None,
    classes: Sequence[str] | None = None,
    unit: str = "file",
) -> tuple[Problem, ...]:
    """Look for leakage, bad labels and unreadable slides; call it once the splits are drawn.

    Checked: a patient, a group or a file, by path or by content, in two splits; the same content twice in one split
    (a warning, unless its labels differ); missing and unknown labels (``classes``: those that a run knows); one class
    only; a class that a split lacks; a patient or slide with several labels, where it is the ``unit`` of the metrics;
    slides that ``open_check`` refuses by a `WholeslideError` or `OSError`.

    Returns:
        Warnings: what was found but does no harm.

    Raises:
        CohortError: everything that was found, together.
    """
    table = cohort.table
    unreadable = {} if open_check is None else _unreadable(table, open_check)
    problems = [problem for found in unreadable.values() for problem in found]
    missing = group_problems(table, group)
    problems += missing
    problems += split_problems(table, group="patient" if missing else group)
    problems += label_problems(table, classes=classes)
    problems += unit_problems(table, unit)
    repeats = list(_repeated_content(table))
    problems += [problem for problem, harmful in repeats if harmful]
    if problems:
        raise CohortError(problems)
    return tuple(problem for problem, harmful in repeats if not harmful)


def leave_out_unreadable(cohort: Cohort, open_check: Callable[[Path], None]) -> tuple[Cohort, pd.DataFrame]:
    """The cohort without the slides that cannot be read, and those, with columns ``file, error``.

    Call it before a split is drawn, so that no class of a split is emptied afterwards.

    Raises:
        CohortError: a class has no slide left; with it, what is wrong with each of its slides.
    """
    unreadable = _unreadable(cohort.table, open_check)
    out = cohort.table["file"].isin(list(unreadable))
    table = cohort.table[~out].reset_index(drop=True)
    lost = sorted(set(cohort.table["label"]) - set(table["label"]))
    if lost:
        problems = [
            Problem("no slide of the class can be read", f"class {name!r}", "mend some of them") for name in lost
        ]
        files = cohort.table.loc[cohort.table["label"].isin(lost), "file"]
        raise CohortError([*problems, *(problem for file in files for problem in unreadable[file])])
    excluded = [(file, "; ".join(map(str, found))) for file, found in unreadable.items()]
    kept = Cohort(table=table, classes=cohort.classes, slides_dir=cohort.slides_dir)
    return kept, pd.DataFrame(excluded, columns=["file", "error"], dtype=object)


def _unreadable(table: pd.DataFrame, open_check: Callable[[Path], None]) -> dict[str, list[Problem]]:
    """The problems of each file that cannot be read."""
    problems: dict[str, list[Problem]] = {}
    for file, path in zip(table["file"], table["path"], strict=True):
        try:
            open_check(Path(path))
        except WholeslideError as error:
            problems[file] = list(error.problems)
        except OSError as error:
            problems[file] = [Problem(f"cannot read the slide, {error}", file, "mend or remove it")]
    return problems


def _repeated_content(table: pd.DataFrame) -> Iterator[tuple[Problem, bool]]:
    """Different files with equal bytes, and whether that does harm."""
    paths = table.loc[table["path"] != "", "path"].drop_duplicates()
    for same in same_content(Path(path) for path in paths):
        rows = table[table["path"].isin([str(path) for path in same])]
        splits = [split for split in rows["split"].drop_duplicates() if split]
        labels = rows["label"].drop_duplicates().tolist()
        what, remedy = "files with the same content", "keep one of them"
        if len(splits) > 1:
            what, remedy = f"{what} in {' and '.join(splits)}", "keep one, or put them in one split"
        elif len(labels) > 1:
            what, remedy = f"{what} are labelled {' and '.join(labels)}", "keep the right one"
        yield Problem(what, name_files(rows["file"]), remedy), len(splits) > 1 or len(labels) > 1
