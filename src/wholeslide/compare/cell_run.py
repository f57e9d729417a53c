"""One cell: train each setting, let validation choose, predict the test fold once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from wholeslide.bench.environment import machine
from wholeslide.compare.cells import Case, Record
from wholeslide.compare.meter import Meter
from wholeslide.compare.predictions import read_predictions
from wholeslide.compare.protocol import Protocol
from wholeslide.errors import Problem, WholeslideError
from wholeslide.metrics import LOWER_IS_BETTER, score
from wholeslide.predict import evaluate_run
from wholeslide.train.checkpoint import write_atomically
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train
from wholeslide.train.run import Run, current_versions

logger = logging.getLogger(__name__)


def trained_parameters(run: Path) -> int:
    """How many weights of a run's network are trained."""
    network = Run.open(run).build_network(pretrained=False)
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class Tools:
    """What a cell is made with: `train`, `evaluate_run`, and the count of a run's trained parameters."""

    train: Callable[[TrainConfig], Any] = train
    evaluate: Callable[[Path, str], Any] = evaluate_run
    parameters: Callable[[Path], int] = trained_parameters


def run_cell(case: Case, tools: Tools | None = None) -> Record:
    """Train and test a cell, going on with what there is of it; its record, which is written as well.

    The test fold is asked for once, of the setting that was chosen, and never before the protocol is there. What goes wrong is kept
    in the record; only a signal that ends the process passes through.
    """
    cell, record = case.cell, case.cell.record
    if record.state == "finished":  # another process was quicker
        return record
    meter = Meter(replace(record, state="begun", problems=[]), cell.record_path)
    try:
        finished = _run(case, tools or Tools(), meter)
    except WholeslideError as error:
        finished = meter.record.failed(error.problems)
    except Exception as error:
        logger.exception("%s", cell)
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        remedy = "call again to try once more; if it stays, report it with this log"
        finished = meter.record.failed([Problem(what, str(cell.log_path), remedy)])
    finished.write(cell.record_path)
    return finished


def _run(case: Case, tools: Tools, meter: Meter) -> Record:
    cell = case.cell
    with meter:
        for training in chain(*case.trainings):
            tools.train(training)
        validation = [_validated(setting, case.classes, tools) for setting in case.trainings[1:] and case.trainings]
    chosen = choose(validation, case.trainings[0][0].monitor)
    runs = [training.out for training in case.trainings[chosen]]
    Protocol.read(cell.out)  # no test score without a protocol
    begun = time.monotonic()
    for run in runs:
        tools.evaluate(run, "test")
    seconds = time.monotonic() - begun
    write_atomically(cell.predictions_path, _averaged(runs, case.classes))
    return replace(
        meter.record,
        state="finished",
        test_seconds=seconds,
        trained_parameters=tools.parameters(runs[0]),
        chosen=chosen,
        validation=validation,
        versions=current_versions(),
        machine=machine(),
    )


def _validated(setting: Sequence[TrainConfig], classes: tuple[str, ...], tools: Tools) -> dict[str, float | None]:
    """The selection metric and the loss of a setting, their means over its validating folds; nothing where one is undefined."""
    monitor, unit = setting[0].monitor, setting[0].unit
    found: dict[str, list[float]] = {monitor: [], "loss": []}
    for training in setting:
        tools.evaluate(training.out, "valid")
        predictions = read_predictions(training.out / "predictions" / "valid.csv")
        for name, values in found.items():
            values.append(score(predictions, classes, unit, name))
    means = {name: fmean(values) for name, values in found.items()}
    return {name: None if math.isnan(value) else value for name, value in means.items()}


def _averaged(runs: Sequence[Path], classes: tuple[str, ...]) -> bytes:
    """The test predictions of runs as one table: the same where there is one run, else with the mean probabilities."""
    paths = [run / "predictions" / "test.csv" for run in runs]
    if len(paths) == 1:
        return paths[0].read_bytes()
    tables = [read_predictions(path) for path in paths]
    columns = [f"prob_{name}" for name in classes]
    mean = np.mean([table.set_index("file").loc[tables[0]["file"], columns].to_numpy() for table in tables], axis=0)
    chosen = np.asarray(classes, dtype=object)[mean.argmax(axis=1)]
    table = tables[0].assign(prediction=chosen, **dict(zip(columns, mean.T, strict=True)))
    return table.to_csv(index=False, lineterminator="\n").encode()


def choose(validation: list[dict[str, float | None]], monitor: str) -> int:
    """The number of the best setting: by the metric, then by the loss, then the earliest. What is undefined comes last."""

    def worth(number: int) -> tuple[float, float, int]:
        value, loss = validation[number][monitor], validation[number]["loss"]
        sign = -1 if monitor in LOWER_IS_BETTER else 1
        return (
            -math.inf if value is None else sign * value,
            -math.inf if loss is None else -loss,
            -number,
        )

    return max(range(len(validation)), key=worth, default=0)
