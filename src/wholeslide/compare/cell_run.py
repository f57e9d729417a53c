"""One cell: train each setting, let validation choose, predict the test fold once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        for training in case.trainings:
            tools.train(training)
        validation = [_validated(training, case.classes, tools) for training in case.trainings[1:] and case.trainings]
    chosen = choose(validation, case.trainings[0].monitor)
    run = case.trainings[chosen].out
    Protocol.read(cell.out)  # no test score without a protocol
    begun = time.monotonic()
    tools.evaluate(run, "test")
    seconds = time.monotonic() - begun
    write_atomically(cell.predictions_path, (run / "predictions" / "test.csv").read_bytes())
    return replace(
        meter.record,
        state="finished",
        test_seconds=seconds,
        trained_parameters=tools.parameters(run),
        chosen=chosen,
        validation=validation,
        versions=current_versions(),
        machine=machine(),
    )


def _validated(training: TrainConfig, classes: tuple[str, ...], tools: Tools) -> dict[str, float | None]:
    """The selection metric and the loss of a setting on its validation fold."""
    tools.evaluate(training.out, "valid")
    predictions = read_predictions(training.out / "predictions" / "valid.csv")
    names = dict.fromkeys((training.monitor, "loss"))
    found = {name: score(predictions, classes, training.unit, name) for name in names}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


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
