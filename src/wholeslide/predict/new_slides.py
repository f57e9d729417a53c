"""Slides that were never seen before."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wholeslide.errors import Problem, WholeslideError
from wholeslide.predict.engine import prefetch_bytes, trained_engine
from wholeslide.predict.inputs import Inputs, find_inputs
from wholeslide.predict.output import MadeWith, PredictionOutput
from wholeslide.predict.table import Row, columns_of
from wholeslide.slides.config import SlideConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.train.inference import iterate_predictions
from wholeslide.train.progress import memory_bytes, progress_bar, slide_note
from wholeslide.train.run import Run
from wholeslide.train.survey import scale_oddities, working_scales
from wholeslide.train.views import Entry, entries

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """What `predict` found.

    ``rows`` has the columns ``file, slide, patient, prediction, prob_<class>…, error``, a row a slide of this call;
    a slide that could not be read has only its names and its ``error``. ``errors`` are those slides' problems.
    ``skipped`` counts the slides that had a prediction before.
    """

    rows: pd.DataFrame
    errors: tuple[Problem, ...]
    skipped: int = 0

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of the slides that could not be read."""
        return self.rows[self.rows["error"] != ""]


def predict(
    run_dir: Path,
    inputs: Sequence[Path],
    *,
    out: Path | None = None,
    slides: Path | None = None,
    mpp_override: float | None = None,
    memory: str | None = None,
    resume: bool = False,
    on_row: Callable[[Row, Sequence[str], tuple[Problem, ...]], None] | None = None,
    quiet: bool = True,
) -> PredictResult:
    """Classify slides with the best checkpoint of a run, read as the run's own slides were.

    Args:
        run_dir: The run.
        inputs: Slides, folders that are searched for slides, and manifests without need of labels.
        out: CSV that gets each row as soon as it is known; it is whole at every moment. What it was made with is kept
            beside it, in ``<out>.made-with.json``.
        slides: Folder of the slides that manifests name; left out: each manifest's own folder.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        memory: Most memory to use, as ``"8GiB"``; left out: the run's own plan.
        resume: Go on with ``out``: what has a prediction there is skipped, what had an error is tried again. Slides are
            told apart by their paths.
        on_row: Is given each row, the table's columns and the row's problems.
        quiet: No progress bar.

    Raises:
        RunError: no such run or checkpoint; ``out`` exists, or is full, or was not made with the same.
        CohortError: a manifest that cannot be used; nothing to predict.
        ConfigError: ``mpp_override`` is no scale; nothing fits into ``memory``.
    """
    run = Run.open(run_dir)
    slide_config = run.slide_config
    if mpp_override is not None:
        slide_config = dataclasses.replace(slide_config, mpp_override=mpp_override)
    columns = columns_of(run.classes)
    found = find_inputs(inputs, slides=slides)
    _warn_of_scales(entries(found.table), slide_config)
    output, named = None, len(found.table)
    if out is not None:
        output = PredictionOutput.open(out, columns, MadeWith.of(run, slide_config), resume=resume)
        found = dataclasses.replace(found, table=output.lacking(found.table))
    engine = trained_engine(run, entries(found.table), slide_config, memory=memory) if len(found.table) else None
    ahead_bytes = prefetch_bytes(run, engine, memory) if engine is not None else 0
    if output is not None:
        output.begin()
    rows: list[Row] = []
    problems: list[Problem] = []
    count = len(found.table) + len(found.missing)
    with progress_bar("predict", count, quiet=quiet) as progress:
        for row, its_problems, note in _predictions(found, engine, slide_config, run, ahead_bytes):
            rows.append(row)
            problems += its_problems
            if output is not None:
                output.add(row)
            if on_row is not None:
                on_row(row, columns, its_problems)
            progress.advance(note)
    return PredictResult(pd.DataFrame(rows, columns=list(columns)), tuple(problems), named - len(found.table))


def _warn_of_scales(slides: Sequence[Entry], config: SlideConfig) -> None:
    """Where pixels are taken as they are stored, slides may differ in scale; else all are read at one."""
    if config.target_mpp is None:
        remedy = "only slides of the scale that was trained on are judged as in training"
        for oddity in scale_oddities(working_scales(slides, config), remedy=remedy):
            logger.warning("%s", oddity)


def _predictions(
    found: Inputs, engine: StreamingEngine | None, slide_config: SlideConfig, run: Run, ahead_bytes: int
) -> Iterator[tuple[Row, tuple[Problem, ...], str]]:
    """Each slide's row, its problems and a note for the progress bar: in order, what is missing first."""
    for file, error in found.missing:
        yield {"file": file, "error": _one_line(error)}, error.problems, ""
    if engine is None:
        return
    failed: list[tuple[Entry, WholeslideError]] = []
    predictions = iterate_predictions(
        engine,
        found.table,
        slide_config,
        cache=run.config.cache,
        on_error=lambda entry, error: failed.append((entry, error)),
        prefetch_bytes=ahead_bytes,
    )
    for prediction in predictions:
        yield from _failures(failed)
        final = prediction.probabilities[-1]
        row: dict[str, object] = _names(prediction.entry)
        row["prediction"] = run.classes[int(np.argmax(final))]
        row |= {f"prob_{name}": float(value) for name, value in zip(run.classes, final, strict=True)}
        yield row | {"error": ""}, (), slide_note(prediction.seconds, memory_bytes(engine.device))
    yield from _failures(failed)


def _failures(failed: list[tuple[Entry, WholeslideError]]) -> Iterator[tuple[Row, tuple[Problem, ...], str]]:
    while failed:
        entry, error = failed.pop(0)
        yield _names(entry) | {"error": _one_line(error)}, error.problems, ""


def _names(entry: Entry) -> dict[str, object]:
    return {"file": entry.file, "slide": entry.slide, "patient": entry.patient}


def _one_line(error: WholeslideError) -> str:
    return "; ".join(" ".join(str(problem).split()) for problem in error.problems)
