"""Predictions of every stage's classifier for the slides of a table: in validation, evaluation and on new slides."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from wholeslide.errors import WholeslideError
from wholeslide.slides.readers import slide_error
from wholeslide.streaming.recovery import SlideMemoryError, memory_for, take_smaller_plan
from wholeslide.train.config import GIB
from wholeslide.train.learner import Learner, Source
from wholeslide.train.prefetch import Ready, View, read_ahead
from wholeslide.train.progress import ProgressTask, memory_bytes, slide_note
from wholeslide.train.views import Entry, entries

V = TypeVar("V", bound=View)

OnError = Callable[[Entry, WholeslideError], None]


@dataclass(frozen=True)
class SlidePrediction:
    """What the network says of one file: ``probabilities`` (K, classes), NaN where a classifier was not asked.

    The last row is the final classifier's.
    """

    entry: Entry
    probabilities: np.ndarray
    seconds: float
    wait_seconds: float


def iterate_predictions(
    engine: Learner[V],
    cohort_table: pd.DataFrame,
    source: Source[V],
    *,
    on_error: OnError | None = None,
    prefetch_bytes: int = GIB,
    smaller_tiles: bool = True,
    classifiers: Collection[int] | None = None,
) -> Iterator[SlidePrediction]:
    """Predict file after file, in the table's order, without augmentation.

    A file that cannot be read is passed to ``on_error`` and left out; without ``on_error`` it ends the iteration. Where memory
    does not suffice, a file is tried again with ``smaller_tiles``, which the engine then keeps; without them that is an error.
    ``classifiers`` are the stages that are asked, counted from 1; all by default.

    Raises:
        SlideError: a file cannot be read, or is too large for the smallest tiles, and there is no ``on_error``.
    """
    ready = read_ahead(entries(cohort_table), source.open, name=lambda entry: entry.file, limit_bytes=prefetch_bytes)
    with closing(ready):
        for item in ready:
            try:
                prediction = _predict(engine, item, classifiers, smaller_tiles=smaller_tiles)
            except WholeslideError as error:
                if on_error is None:
                    raise
                on_error(item.item, error)
                continue
            yield prediction


def predict_slides(
    engine: Learner[V],
    cohort_table: pd.DataFrame,
    source: Source[V],
    *,
    classes: Sequence[str],
    on_error: OnError | None = None,
    progress: ProgressTask | None = None,
    prefetch_bytes: int = GIB,
    smaller_tiles: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of predictions: of the final classifier, and of every stage's.

    Both have a row a file with the columns ``file, slide, patient, label, prediction, prob_<class>…``; the second has
    ``stage`` too, from 1. See :func:`iterate_predictions` for the other arguments.

    Raises:
        SlideError: see there.
    """
    rows: list[dict[str, Any]] = []
    for found in iterate_predictions(
        engine,
        cohort_table,
        source,
        on_error=on_error,
        prefetch_bytes=prefetch_bytes,
        smaller_tiles=smaller_tiles,
    ):
        rows.extend(stage_rows(found, classes))
        if progress is not None:
            progress.advance(slide_note(found.seconds, memory_bytes(engine.device)))
    columns = ["file", "slide", "patient", "label", "prediction", *(f"prob_{name}" for name in classes)]
    by_stage = pd.DataFrame(rows, columns=["stage", *columns])
    final = by_stage[by_stage["stage"] == engine.network.depth]
    return final[columns].reset_index(drop=True), by_stage


def stage_rows(found: SlidePrediction, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A prediction as table rows, one a stage."""
    rows = []
    for stage, probabilities in enumerate(found.probabilities, start=1):
        columns = {f"prob_{name}": float(value) for name, value in zip(classes, probabilities, strict=True)}
        chosen = classes[int(np.argmax(probabilities))]
        rows.append({"stage": stage, **found.entry.identity, "prediction": chosen, **columns})
    return rows


def _predict(
    engine: Learner[V], item: Ready[Entry, V], classifiers: Collection[int] | None, *, smaller_tiles: bool
) -> SlidePrediction:
    begin = time.perf_counter()
    with memory_for(item.item.file), item.view() as view:
        probabilities = _probabilities(engine, view, item.item.file, classifiers, smaller_tiles=smaller_tiles)
    asked = [number - 1 for number in classifiers] if classifiers is not None else slice(None)
    if not np.isfinite(probabilities[asked]).all():
        remedy = "the weights have diverged: train again with a smaller --lr"
        raise slide_error("the network's answer is not a number", item.item.path, remedy)
    waited_seconds = item.wait_seconds + engine.waited_seconds
    return SlidePrediction(item.item, probabilities, time.perf_counter() - begin, waited_seconds)


def _probabilities(
    engine: Learner[V], view: V, file: str, classifiers: Collection[int] | None, *, smaller_tiles: bool
) -> np.ndarray:
    """(K, classes), with as small tiles as it takes."""
    while True:
        try:
            with memory_for(file):
                return np.asarray(engine.predict(view, classifiers=classifiers), dtype=np.float64)
        except SlideMemoryError as error:
            if not smaller_tiles:
                raise
            reason = error.reason
        take_smaller_plan(engine, file, reason)
