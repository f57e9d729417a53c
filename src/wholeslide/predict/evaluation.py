"""A run's numbers on one of its splits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from wholeslide.errors import Problem, RunError, SlideError, WholeslideError
from wholeslide.metrics import METRICS, aggregate, evaluate
from wholeslide.predict.engine import device_of, open_run, plan_for, prefetch_bytes, trained_engine
from wholeslide.slides.config import Decoders
from wholeslide.slides.lock import alone_on
from wholeslide.train.checkpoint import disk_errors, write_atomically
from wholeslide.train.inference import predict_slides
from wholeslide.train.learner import Learner
from wholeslide.train.progress import progress_bar
from wholeslide.train.run import Run
from wholeslide.train.views import Entry, entries

FOLDERS = ("predictions", "metrics")
UNIT_FILES: dict[Literal["slide", "patient"], str] = {"slide": "slides", "patient": "patients"}


def evaluate_run(
    run_dir: Path,
    split: str = "test",
    *,
    slides: Path | None = None,
    decoders: Decoders | None = None,
    memory: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Score the best checkpoint of a run on one of its splits, and write what was found into the run.

    ``predictions/{split}.csv`` has a row a file, ``{split}_slides.csv`` and ``{split}_patients.csv`` a row a slide and
    patient (probabilities averaged upwards), ``{split}_by_stage.csv`` a row a file and stage. ``metrics/{split}.json``
    has what is returned.

    Args:
        run_dir: The run.
        split: ``test``, ``valid`` or ``train``.
        slides: Folder of the slides, if they have been moved since the training.
        decoders: Where files are decoded, as `SlideConfig` has it; left out: as in training.
        memory: Most memory to use, as ``"8GiB"``; left out: the run's own plan.
        quiet: No progress bar.

    Returns:
        `wholeslide.metrics.evaluate`'s dictionary of the final classifier, and with it ``split``, ``checkpoint_step``
        and ``stages``: for each stage's own classifier, from 1, its metrics.

    Raises:
        RunError: no such run, checkpoint or split; another process evaluates it on this split; the run cannot be written; the
            disk is full.
        SlideError: slides cannot be read: all of them together, and nothing is written.
    """
    run = open_run(run_dir, decoders)
    return score_table(run, _table(run, split, slides), split, memory=memory, quiet=quiet)


def score_table(run: Run, table: pd.DataFrame, name: str, *, memory: str | None, quiet: bool) -> dict[str, Any]:
    """Score the best checkpoint of a run on labelled files, and write what was found into the run, under a name.

    Args:
        run: the run.
        table: rows of a cohort.
        name: what the files are called; ``split`` in the result.
        memory: as for `evaluate_run`.
        quiet: likewise.

    Raises:
        RunError: there is no checkpoint; another process writes under this name; the run cannot be written; the disk is full.
        SlideError: slides cannot be read: all of them together, and nothing is written.
    """
    _check_writable(run)
    with alone_on(run.path / "metrics" / f"{name}.json", remedy="wait until it has ended"):
        return _score_alone(run, table, name, memory, quiet=quiet)


def _score_alone(run: Run, table: pd.DataFrame, name: str, memory: str | None, *, quiet: bool) -> dict[str, Any]:
    """`score_table`, with nobody else at the files of this name; a training of the run may go on."""
    best = run.checkpoints.pointer("best")
    engine = _engine(run, table, memory, checkpoint=best.sha256)
    problems: list[Problem] = []

    def note(entry: Entry, error: WholeslideError) -> None:
        problems.extend(error.problems)

    with progress_bar(f"evaluate {name}", len(table), quiet=quiet) as progress:
        final, by_stage = predict_slides(
            engine,
            table,
            run.source(engine.network),
            classes=run.classes,
            on_error=note,
            progress=progress,
            prefetch_bytes=prefetch_bytes(run, engine, memory),
        )
    if problems:
        raise SlideError(problems)
    found = {
        "split": name,
        "checkpoint_step": best.state.step,
        **_score(final, by_stage, run.classes, run.config.unit),
    }
    _write(run, name, final, by_stage, found)
    return found


def _table(run: Run, split: str, slides: Path | None) -> pd.DataFrame:
    table: pd.DataFrame = run.cohort(slides).split(split)
    if table.empty:
        raise RunError.single(
            f"no slide is in the split {split!r}",
            where=str(run.path / "cohort.csv"),
            remedy="use --split test or valid",
        )
    return table


def _engine(run: Run, table: pd.DataFrame, memory: str | None, *, checkpoint: str) -> Learner[Any]:
    device = device_of(run.config.accelerator)
    plan = plan_for(run, entries(table), run.slide_config, device, memory=memory)
    return trained_engine(run, plan, device, checkpoint=checkpoint)


def _check_writable(run: Run) -> None:
    """See that the results can be kept, before they are computed.

    Raises:
        RunError: a folder of the run cannot be written.
    """
    for folder in (run.path / name for name in FOLDERS):
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise RunError.single(
                f"the results cannot be written: {error.strerror or error}",
                where=str(folder),
                remedy="change its permissions, or evaluate a copy of the run that you may write",
            ) from error


def _score(final: pd.DataFrame, by_stage: pd.DataFrame, classes: Sequence[str], unit: str) -> dict[str, Any]:
    stages = []
    for stage in sorted(by_stage["stage"].unique()):
        rows = by_stage[by_stage["stage"] == stage].drop(columns="stage").reset_index(drop=True)
        metrics = evaluate(rows, classes=classes, unit=unit)
        stages.append({"stage": int(stage), **{name: metrics[name] for name in METRICS}})
    return {**evaluate(final, classes=classes, unit=unit), "stages": stages}


def _write(run: Run, split: str, final: pd.DataFrame, by_stage: pd.DataFrame, found: dict[str, Any]) -> None:
    """Files first, numbers last: where there are numbers, they have their predictions beside them."""
    predictions, metrics = (run.path / name for name in FOLDERS)
    tables = {f"{split}.csv": final, f"{split}_by_stage.csv": by_stage}
    for unit, name in UNIT_FILES.items():
        tables[f"{split}_{name}.csv"] = aggregate(final, unit, run.classes, conflicting_labels="blank")
    with disk_errors(run.path):
        for name, table in tables.items():
            write_atomically(predictions / name, table.to_csv(index=False, lineterminator="\n").encode())
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(metrics / f"{split}.json", text.encode())
