"""The audit that stops a run before it trains on something it must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from wholeslide.cohort.checks import group_problems, label_problems, name_files, split_problems, unit_problems
from wholeslide.cohort.duplicates import same_content
from wholeslide.cohort.manifest import Cohort, sorted_classes
from wholeslide.errors import CohortError, Problem, WholeslideError


@dataclass(frozen=True)
class AuditResult:
    """A cohort that may be trained on.

    ``excluded`` has columns ``file, error``, a row for each slide that could not be read and was left out;
    ``warnings`` are what was found but does no harm.
    """

    cohort: Cohort
    excluded: pd.DataFrame
    warnings: tuple[Problem, ...]


def audit(
    cohort: Cohort,
    *,
    group: str = "patient",
    open_check: Callable[[Path], None] | None = None,
    on_unreadable: Literal["stop", "exclude"] = "stop",
    classes: Sequence[str] | None = None,
    unit: str = "file",
) -> AuditResult:
    """Look for leakage, bad labels and unreadable slides; call it once the splits are drawn.

    Checked: a patient, a group or a file, by path or by content, in two splits; the same content twice in one split
    (a warning, unless its labels differ); missing and unknown labels (``classes``: those that a run knows); one class
    only; a class that a split lacks; a patient or slide with several labels, where it is the ``unit`` of the metrics;
    slides that ``open_check`` refuses by a `WholeslideError` or `OSError`. With ``exclude`` those are left out and
    listed, and the rest is checked without them.

    Raises:
        CohortError: everything that was found, together.
    """
    problems, excluded = _unreadable(cohort, open_check)
    unreadable_files = {file for file, _ in excluded}
    if on_unreadable == "exclude":
        problems = []
    table = cohort.table[~cohort.table["file"].isin(unreadable_files)].reset_index(drop=True)
    if table.empty:
        problems.append(Problem("no slide is left", "manifest", "mend the slides that cannot be read"))
        raise CohortError([*problems, *(Problem(error, file, "mend or remove it") for file, error in excluded)])
    checked = table if on_unreadable == "exclude" else cohort.table
    missing = group_problems(checked, group)
    problems += missing
    problems += split_problems(checked, group="patient" if missing else group)
    problems += label_problems(checked, classes=classes)
    problems += unit_problems(checked, unit)
    repeats = list(_repeated_content(checked))
    problems += [problem for problem, harmful in repeats if harmful]
    if problems:
        raise CohortError(problems)
    return AuditResult(
        cohort=Cohort(table=table, classes=sorted_classes(table["label"]), slides_dir=cohort.slides_dir),
        excluded=pd.DataFrame(excluded, columns=["file", "error"], dtype=object),
        warnings=tuple(problem for problem, harmful in repeats if not harmful),
    )


def _unreadable(
    cohort: Cohort, open_check: Callable[[Path], None] | None
) -> tuple[list[Problem], list[tuple[str, str]]]:
    """The problems of the slides that cannot be read, and the same as (file, error)."""
    problems: list[Problem] = []
    excluded: list[tuple[str, str]] = []
    if open_check is None:
        return problems, excluded
    for file, path in zip(cohort.table["file"], cohort.table["path"], strict=True):
        try:
            open_check(Path(path))
        except WholeslideError as error:
            found = list(error.problems)
        except OSError as error:
            found = [Problem(f"cannot read the slide, {error}", file, "mend or remove it, or --on-unreadable exclude")]
        else:
            continue
        problems += found
        excluded.append((file, "; ".join(map(str, found))))
    return problems, excluded


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
