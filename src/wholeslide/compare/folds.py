"""The folds of a comparison: drawn once or taken from the manifest, checked, and hashed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from wholeslide.cohort.audit import leave_out_unreadable
from wholeslide.cohort.checks import group_problems, label_problems, split_problems, unit_problems
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.cohort.splits import fold_cohort, split_by_fold
from wholeslide.compare.config import FOLDS, CompareConfig
from wholeslide.errors import CohortError, Problem
from wholeslide.train.survey import raise_finding, survey
from wholeslide.train.views import entries

_NUMBER = re.compile(r"0|[1-9]\d*")


@dataclass(frozen=True)
class Folds:
    """A cohort with a column ``fold``, once for each draw; no two draws have a fold of one name.

    ``drawn`` tells whether they were drawn here; ``excluded`` are the files left out.
    """

    draws: tuple[Cohort, ...]
    drawn: bool
    excluded: tuple[str, ...]

    @property
    def cohort(self) -> Cohort:
        """With the folds of the first draw."""
        return self.draws[0]

    @property
    def table(self) -> pd.DataFrame:
        """The files of all draws, one after another, with a column ``draw``, from 1."""
        return pd.concat(
            [cohort.table.assign(draw=number) for number, cohort in enumerate(self.draws, start=1)], ignore_index=True
        )

    def facts(self) -> dict[str, Any]:
        """What the protocol holds of them: counts and hashes, of each fold and of all."""
        table = self.table
        parts = []
        for name in fold_names(table):
            rows = table[table["fold"] == name]
            labels = {label: int((rows["label"] == label).sum()) for label in self.cohort.classes}
            counts = {"files": len(rows), "patients": int(rows["patient"].nunique()), "labels": labels}
            draw = {"draw": int(rows["draw"].iloc[0])} if len(self.draws) > 1 else {}
            parts.append({"fold": name, **draw, **counts, "sha256": fold_hash(rows)})
        return {"drawn": self.drawn, "sha256": fold_hash(table), "parts": parts}


def fold_names(table: pd.DataFrame) -> list[str]:
    """The folds of a table, by number."""
    return sorted(set(table["fold"]), key=int)


def fold_hash(table: pd.DataFrame) -> str:
    """SHA-256 over the sorted lines ``["file", "patient", "label", "fold"]`` (JSON, each with its end) of a table's rows."""
    columns = ["file", "patient", "label", "fold"]
    lines = sorted(json.dumps(list(row)) + "\n" for row in table[columns].itertuples(index=False))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def make_folds(config: CompareConfig) -> Folds:
    """The folds of a new comparison: the manifest's, or drawn.

    With ``--on-unreadable exclude`` every slide is opened, and those that cannot be read are left out for all methods alike.

    Raises:
        CohortError: all that is wrong with the manifest and with its folds.
    """
    train = config.train
    exclude = train.on_unreadable == "exclude"
    cohort = read_cohort(train.manifest, train.slides, keep_missing=exclude)
    excluded: tuple[str, ...] = ()
    if exclude:
        findings = survey(entries(cohort.table), train.slide_config(), cache=train.cache, quiet=train.quiet)
        cohort, lost = leave_out_unreadable(cohort, partial(raise_finding, findings))
        excluded = tuple(lost["file"])
    missing = group_problems(cohort.table, train.group)
    if missing:
        raise CohortError(missing)
    drawn = "fold" not in cohort.table
    if not drawn and config.repeats > 1:
        what, remedy = "the manifest has folds of its own", "leave --repeats out, or remove the column 'fold'"
        raise CohortError.single(what, where=f"--repeats {config.repeats}", remedy=remedy)
    draws = tuple(_draw(cohort, config, number) for number in range(config.repeats)) if drawn else (cohort,)
    for found in draws:
        check_folds_of(found, config)
    return Folds(draws, drawn, excluded)


def _draw(cohort: Cohort, config: CompareConfig, number: int) -> Cohort:
    """Folds by the ``number``-th seed, numbered on from those of the draws before."""
    folds, train = config.folds or FOLDS, config.train
    found = fold_cohort(cohort, folds=folds, group=train.group, seed=train.seed + number)
    names = [str(int(name) + number * folds) for name in found.table["fold"]]
    return Cohort(found.table.assign(fold=names), found.classes, found.slides_dir)


def check_folds_of(cohort: Cohort, config: CompareConfig) -> None:
    """See that each fold can be tested, and shares no patient with another.

    Raises:
        CohortError: all that is in the way.
    """
    table, train = cohort.table, config.train
    problems = list(_name_problems(sorted(set(table["fold"])), config.folds))
    problems += [*split_problems(table, group=train.group), *unit_problems(table, train.unit)]
    if not problems:
        for name in fold_names(table):
            problems += _class_problems(cohort, name)
    if problems:
        raise CohortError(dict.fromkeys(problems))


def _name_problems(names: Sequence[str], asked: int | None) -> Iterable[Problem]:
    odd = [name for name in names if not _NUMBER.fullmatch(name)]
    if odd:
        shown = ", ".join(repr(name) for name in odd)
        yield Problem(f"{shown} is no number of a fold", "column 'fold'", "number the folds 0, 1, 2 …")
    if asked is not None and asked != len(names):
        remedy = "leave --folds out, or have others drawn, without the column 'fold' and into another --out"
        yield Problem(f"there are {len(names)} folds", f"--folds {asked}", remedy)


def _class_problems(cohort: Cohort, fold: str) -> list[Problem]:
    """A class that is missing where this fold is tested, validated or left out."""
    table = split_by_fold(cohort, int(fold)).table
    return [
        Problem(
            problem.what, f"testing on fold {fold}", "deal the classes to the folds more evenly, or ask for fewer folds"
        )
        for problem in label_problems(table)
    ]
