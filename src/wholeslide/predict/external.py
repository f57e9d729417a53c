"""A run's numbers on another cohort, after it is seen that the run was not trained on any of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from wholeslide.cohort.audit import audit
from wholeslide.cohort.checks import name_files
from wholeslide.cohort.duplicates import same_content
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.errors import CohortError, ConfigError, Problem, WholeslideError
from wholeslide.predict.engine import open_run
from wholeslide.predict.evaluation import score_table
from wholeslide.slides.config import Decoders
from wholeslide.train.run import Run

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REMEDY = "take it out of the manifest; if it is another one of this name, name it otherwise"


def evaluate_external(
    run_dir: Path,
    manifest: Path,
    slides: Path,
    *,
    name: str | None = None,
    decoders: Decoders | None = None,
    memory: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Score the best checkpoint of a run on a labelled cohort that it was not made from.

    Written are ``predictions/external-<name>.csv`` (with ``_slides``, ``_patients`` and ``_by_stage``) and
    ``metrics/external-<name>.json``.

    Args:
        run_dir: The run.
        manifest: CSV of the other cohort, as `train` takes it; splits in it are not looked at.
        slides: Folder of its slides.
        name: What it is called; left out: the manifest's stem.
        decoders: Where files are decoded, as `SlideConfig` has it; left out: as in training.
        memory: Most memory to use, as ``"8GiB"``; left out: the run's own plan.
        quiet: No progress bar.

    Returns:
        As `evaluate_run`.

    Raises:
        RunError: no such run or checkpoint; another process writes under this name; the run cannot be written; the disk is full.
        CohortError: all that is wrong with the manifest; labels that the run does not know; patients and files that the run was
            trained or validated on, whatever the files are called.
        ConfigError: the name is none for a file.
        SlideError: slides cannot be read: all of them together, and nothing is written.
    """
    called = manifest.stem if name is None else name
    if not _NAME.fullmatch(called):
        raise ConfigError.single(
            "not a name for files", where=f"--name {called}", remedy="give letters, digits, dots, dashes"
        )
    run = open_run(run_dir, decoders)
    cohort = read_cohort(manifest, slides)
    cohort = Cohort(
        cohort.table.assign(split="").drop(columns="fold", errors="ignore"), cohort.classes, cohort.slides_dir
    )
    problems: list[Problem] = list(overlap_problems(cohort.table, _seen(run)))
    try:
        for warning in audit(cohort, classes=run.classes, unit=run.config.unit):
            logger.warning("%s", warning)
    except CohortError as error:
        problems += error.problems
    if problems:
        raise CohortError(dict.fromkeys(problems))
    return score_table(run, cohort.table, f"external-{called}", memory=memory, quiet=quiet)


def overlap_problems(table: pd.DataFrame, seen: pd.DataFrame) -> Iterator[Problem]:
    """Patients and files of a cohort that a run has ``seen``: by name, by path and by content.

    Both have the columns of a cohort; files of ``seen`` whose ``path`` is empty are compared by name.
    """
    known = seen.groupby("patient")["split"].agg(lambda splits: " and ".join(sorted(set(splits))))
    for patient, rows in table[table["patient"].isin(known.index)].groupby("patient"):
        where = name_files(rows["file"])
        yield Problem(f"patient {patient!r} is in the run's {known[patient]} split", where, _REMEDY)
    unresolved = seen[seen["path"] == ""]
    for file in table.loc[table["file"].isin(unresolved["file"]), "file"]:
        yield Problem("a file of this name is in the run's training or validation", str(file), _REMEDY)
    theirs = _by_path(table)
    ours = _by_path(seen[seen["path"] != ""])
    same = [[path] for path in theirs if path in ours] + same_content([*theirs, *ours])
    for paths in same:
        told = [ours[path] for path in paths if path in ours]
        for path in paths:
            if path in theirs and told:
                yield Problem(
                    f"the same content as {told[0]}, which the run has seen",
                    theirs[path],
                    "take it out of the manifest",
                )


def _by_path(table: pd.DataFrame) -> dict[Path, str]:
    """The files of a table by their resolved paths."""
    return {Path(path).resolve(): str(file) for path, file in zip(table["path"], table["file"], strict=True)}


def _seen(run: Run) -> pd.DataFrame:
    """The training and validation rows of a run; with empty paths where its slides are no longer there."""
    try:
        table = run.cohort().table
    except WholeslideError:
        logger.warning("the run's slides are not in %s: the cohorts are compared by names alone", run.config.slides)
        table = read_cohort(run.path / "cohort.csv").table
    found: pd.DataFrame = table[table["split"].isin(["train", "valid"])]
    return found
