"""Stratified splits and folds that never cut a patient.

Groups are what must stay together: the patients, joined wherever a value of ``--group`` links them. A group belongs to
the stratum of its *set* of labels, so that patients with both benign and malignant files are spread over the parts as
well. Each stratum is divided in the asked proportions, to within a group or so; which group goes where is drawn by the
seed, and of several draws the one is taken whose parts come closest to the proportions in files of each class. Where
sizes are asked for in place of proportions, single groups are moved or exchanged until they are met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from wholeslide.cohort.checks import group_problems, name_files
from wholeslide.cohort.config import (
    DEFAULT_FRACTIONS,
    SPLITS,
    Fractions,
    Sizes,
    check_folds,
    check_fractions,
    check_sizes,
)
from wholeslide.cohort.manifest import Cohort
from wholeslide.cohort.sizes import CLASS_LACKING, apportioned, meet_sizes, unlikeness
from wholeslide.errors import CohortError, Problem
from wholeslide.slides.files import write_atomically

_DRAWS = 8


def split_cohort(
    cohort: Cohort,
    *,
    fractions: Fractions = DEFAULT_FRACTIONS,
    sizes: Sizes | None = None,
    group: str = "patient",
    seed: int = 0,
) -> Cohort:
    """The cohort with a drawn ``split``; an earlier split is replaced.

    ``sizes`` are files, in place of the fractions: scaled to the files that there are, and met as nearly as whole groups
    allow.

    Raises:
        ConfigError: the fractions are not three parts of 1, or the sizes no numbers of files.
        CohortError: no such group column, or a class has too few groups to be in every part.
    """
    if sizes is not None:
        check_sizes(sizes)
        fractions = (sizes[0] / sum(sizes), sizes[1] / sum(sizes), sizes[2] / sum(sizes))
    check_fractions(fractions)
    names = [name for name, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    wanted = np.array([fraction for fraction in fractions if fraction > 0])
    files = None if sizes is None else apportioned(np.array([size for size in sizes if size > 0]), len(cohort.table))
    part = _draw(cohort, wanted, group=group, seed=seed, what=f"{len(names)} splits", sizes=files)
    table = cohort.table.drop(columns="fold", errors="ignore").assign(split=[names[index] for index in part])
    return Cohort(table=table, classes=cohort.classes, slides_dir=cohort.slides_dir)


def divide_around_test(
    cohort: Cohort,
    *,
    fractions: Fractions = DEFAULT_FRACTIONS,
    sizes: Sizes | None = None,
    group: str = "patient",
    seed: int = 0,
) -> Cohort:
    """The same as `split_cohort`, but what the manifest calls test stays so, and only the others are divided.

    The last fraction or size is not used: the test split is what it is.

    Raises:
        ConfigError: as `split_cohort`.
        CohortError: no test file, a patient or a group with files in the test split and elsewhere, or as `split_cohort`.
    """
    table = cohort.table
    problems = group_problems(table, group)
    tested = (table["split"] == "test").to_numpy()
    if not tested.any() or tested.all():
        what = "every file is in the test split" if tested.any() else "no file is in the test split"
        remedy = "give a manifest whose column 'split' says test for some files, or leave out --keep-test"
        problems.append(Problem(what, "--keep-test", remedy))
    if not problems:
        joined = pd.Series(_joined_groups(table, list(dict.fromkeys(("patient", group)))))
        crossing = joined[tested].unique()[np.isin(joined[tested].unique(), joined[~tested])]
        problems = [
            Problem(
                f"patient {', '.join(rows['patient'].unique())} is in the test split and outside of it",
                name_files(rows["file"]),
                "put all files of the patient, or of its group, in test or none",
            )
            for rows in (table[(joined == number).to_numpy()] for number in crossing)
        ]
    if problems:
        raise CohortError(problems)
    check_fractions(fractions)
    divided = fractions[0] + fractions[1]
    others = split_cohort(
        Cohort(table=table[~tested], classes=cohort.classes, slides_dir=cohort.slides_dir),
        fractions=(fractions[0] / divided, fractions[1] / divided, 0.0),
        sizes=None if sizes is None else (sizes[0], sizes[1], 0),
        group=group,
        seed=seed,
    )
    split = table["split"].where(tested, others.table["split"].reindex(table.index))
    table = table.drop(columns="fold", errors="ignore").assign(split=split)
    return Cohort(table=table, classes=cohort.classes, slides_dir=cohort.slides_dir)


def fold_cohort(cohort: Cohort, *, folds: int, group: str = "patient", seed: int = 0) -> Cohort:
    """The cohort with a column ``fold`` (``"0"`` … ``"folds-1"``) and without a split; see `split_by_fold`.

    Raises:
        ConfigError: fewer than two folds.
        CohortError: no such group column, or a class has fewer groups than there are folds.
    """
    check_folds(folds)
    part = _draw(cohort, np.full(folds, 1 / folds), group=group, seed=seed, what=f"{folds} folds")
    table = cohort.table.assign(split="", fold=[str(index) for index in part])
    return Cohort(table=table, classes=cohort.classes, slides_dir=cohort.slides_dir)


def split_by_fold(cohort: Cohort, fold: int, valid: int | None = None) -> Cohort:
    """Tests on one fold, validates on ``valid`` or else on the next, trains on the others.

    Raises:
        CohortError: no column ``fold``, files that it leaves out, fewer than three folds, or no such folds.
    """
    if "fold" not in cohort.table:
        raise CohortError([Problem("no column 'fold'", "manifest", "draw one with `wholeslide split --folds`")])
    outside = cohort.table.loc[cohort.table["fold"] == "", "file"]
    if len(outside):
        raise CohortError(Problem("no fold", str(file), "fill the column 'fold' in each row") for file in outside)
    names = sorted(set(cohort.table["fold"]), key=lambda name: (len(name), name))
    if len(names) < 3 or str(fold) not in names:
        remedy = "testing, validating and training take three folds or more"
        raise CohortError([Problem(f"no fold {fold} to test on", f"folds {', '.join(names)}", remedy)])
    following = names[(names.index(str(fold)) + 1) % len(names)]
    validating = following if valid is None else str(valid)
    if validating not in names or validating == str(fold):
        raise CohortError(
            [
                Problem(
                    f"no fold {validating} to validate on",
                    f"folds {', '.join(names)}",
                    "choose another than the tested",
                )
            ]
        )
    roles = {str(fold): "test", validating: "valid"}
    table = cohort.table.assign(split=cohort.table["fold"].map(roles).fillna("train"))
    return Cohort(table=table, classes=cohort.classes, slides_dir=cohort.slides_dir)


def write_split(cohort: Cohort, path: Path) -> None:
    """Write the table as a manifest that `read_cohort` takes: all but ``path`` and what is empty throughout.

    Written beside and renamed, so that a file that is there is whole.

    Raises:
        RunError: the file cannot be written.
    """
    table = cohort.table.drop(columns="path")
    if table["mpp"].isna().all():
        table = table.drop(columns="mpp")
    empty = [name for name in ("label", "split") if (table[name] == "").all()]
    with write_atomically(path) as beside:
        table.drop(columns=empty).to_csv(beside, index=False, lineterminator="\n", encoding="utf-8")


def _draw(
    cohort: Cohort, fractions: np.ndarray, *, group: str, seed: int, what: str, sizes: np.ndarray | None = None
) -> np.ndarray:
    """The part of each row, (rows,) int; ``sizes`` (parts,) are the files that each should have."""
    table = cohort.table
    problems = group_problems(table, group)
    if problems:
        raise CohortError(problems)
    group_of_row = _joined_groups(table, list(dict.fromkeys(("patient", group))))
    classes = sorted(set(table["label"]))
    files = np.zeros((group_of_row.max() + 1, len(classes)), dtype=np.int64)
    np.add.at(files, (group_of_row, np.searchsorted(classes, list(table["label"]))), 1)
    named = [index for index, label in enumerate(classes) if label]
    problems = [
        Problem(
            f"{count} {group if count == 1 else f'{group}s'} cannot be in {what}",
            f"class {classes[index]!r}",
            "ask for fewer parts, or add slides of the class",
        )
        for index in named
        if (count := int((files[:, index] > 0).sum())) < len(fractions)
    ]
    if problems:
        raise CohortError(problems)
    part_of_group = _assign(files, fractions, np.random.default_rng(seed))
    part_of_group = _cover(part_of_group, files, named, fractions)
    if sizes is not None:
        part_of_group = meet_sizes(part_of_group, files, sizes)
    for index in named:
        lacking = set(range(len(fractions))) - set(part_of_group[files[:, index] > 0])
        problems += [
            Problem(f"no way found to have it in all of {what}", f"class {classes[index]!r}", "ask for fewer parts")
        ] * bool(lacking)
    if problems:
        raise CohortError(problems)
    return np.asarray(part_of_group[group_of_row])


def _joined_groups(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """A number for each row, (rows,) int: equal where rows share a value of any column, directly or over other rows.

    Numbers follow the names, not the order of the rows.
    """
    group = table[columns[0]].astype(str).rank(method="dense").to_numpy(dtype=np.int64) - 1
    for column in columns[1:]:
        values = table[column].astype(str)
        while True:  # the smallest number spreads until nothing changes
            spread = pd.Series(group).groupby(values.to_numpy()).transform("min")
            joined = spread.groupby(table[columns[0]].to_numpy()).transform("min").to_numpy()
            if (joined == group).all():
                break
            group = joined
    return np.unique(group, return_inverse=True)[1]


def _assign(files: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The part of each group, (groups,) int; ``files`` (groups, classes) counts the files."""
    strata = np.unique(files > 0, axis=0, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(strata)
    counts = _counts(
        sizes, fractions, floor_one=np.array([(files[strata == s][0] > 0).sum() == 1 for s in range(len(sizes))])
    )
    best, lowest = np.empty(0, dtype=np.int64), math.inf
    for _ in range(_DRAWS):
        parts = np.empty(len(files), dtype=np.int64)
        for stratum in range(len(sizes)):
            members = rng.permutation(np.flatnonzero(strata == stratum))
            parts[members] = np.repeat(np.arange(len(fractions)), counts[stratum])
        cost = _cost(parts, files, fractions)
        if cost < lowest:
            best, lowest = parts, cost
    return best


def _counts(sizes: np.ndarray, fractions: np.ndarray, *, floor_one: np.ndarray) -> np.ndarray:
    """How many groups of each stratum go to each part, (strata, parts) int.

    Rounded down, then the groups left over go where the parts are furthest behind over all strata so far, so that many
    small strata do not starve a small part. A stratum of one class alone that has a group for every part gives each at
    least one, which is not held against the part in other strata.
    """
    counts = np.zeros((len(sizes), len(fractions)), dtype=np.int64)
    behind = np.zeros(len(fractions))
    for stratum, size in enumerate(sizes):
        wanted = size * fractions
        if floor_one[stratum] and size >= len(fractions):
            wanted = _at_least_one(wanted)
        row = np.floor(wanted + 1e-9).astype(np.int64)
        behind += wanted - row
        for _ in range(size - row.sum()):
            neediest = int(np.argmax(behind))
            row[neediest] += 1
            behind[neediest] -= 1
        counts[stratum] = row
    return counts


def _at_least_one(wanted: np.ndarray) -> np.ndarray:
    """The same total with no part under one; what that takes comes from the other parts, by their size above one."""
    while (wanted < 1 - 1e-9).any():
        above = np.maximum(wanted - 1, 0)
        lacking = np.maximum(1 - wanted, 0)
        wanted = wanted + lacking - above / above.sum() * min(lacking.sum(), above.sum())
    return wanted


def _cost(parts: np.ndarray, files: np.ndarray, fractions: np.ndarray) -> float:
    """How unlike the asked proportions the parts are: classes that a part lacks first, then files of each class."""
    share = np.stack([files[parts == part].sum(axis=0) for part in range(len(fractions))]) / files.sum(axis=0)
    return unlikeness(share, fractions)


def _cover(parts: np.ndarray, files: np.ndarray, named: Sequence[int], fractions: np.ndarray) -> np.ndarray:
    """Move single groups while that brings a class to a part that lacks it."""
    cost = _cost(parts, files[:, list(named)], fractions)
    while cost >= CLASS_LACKING:
        moved = []
        for group in range(len(parts)):
            for part in set(range(len(fractions))) - {int(parts[group])}:
                trial = parts.copy()
                trial[group] = part
                moved.append((_cost(trial, files[:, list(named)], fractions), group, part))
        lowest, group, part = min(moved)
        if lowest >= cost:
            break
        parts = parts.copy()
        parts[group], cost = part, lowest
    return parts
