"""Where a training run stands, between two optimiser steps. Everything that exact resuming needs beside the tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wholeslide.train.optim import RateState


@dataclass(frozen=True)
class Best:
    """The best epoch so far of the stages that are being trained, by the monitored metric.

    ``score`` is larger for better (a loss is negated); ``loss`` breaks ties. ``file`` and ``sha256`` name its
    checkpoint.
    """

    score: float
    loss: float
    epoch: int
    step: int
    file: str
    sha256: str


@dataclass(frozen=True)
class EpochLoss:
    """One epoch's classification loss of the last trained stage: mean, standard deviation, number of slides."""

    mean: float
    deviation: float
    slides: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(max(1, self.slides))


@dataclass
class RunningLosses:
    """Sums over the slides of an epoch, per stage: classification losses, their squares, reconstruction losses."""

    slides: int = 0
    classification: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)

    def add(self, classification: Sequence[float], reconstruction: Sequence[float]) -> None:
        """Count one slide. ``nan`` stands for a stage that was not trained, and stays."""
        self.slides += 1
        self.classification = _added(self.classification, classification)
        self.squares = _added(self.squares, [loss * loss for loss in classification])
        self.reconstruction = _added(self.reconstruction, reconstruction)

    def means(self) -> tuple[list[float], list[float]]:
        """Mean classification and reconstruction loss of every stage."""
        count = max(1, self.slides)
        return [total / count for total in self.classification], [total / count for total in self.reconstruction]

    def epoch_loss(self, stage: int) -> EpochLoss:
        """Summary of one stage, counted from 1."""
        mean = self.classification[stage - 1] / self.slides
        variance = max(0.0, self.squares[stage - 1] / self.slides - mean * mean)
        return EpochLoss(mean, math.sqrt(variance), self.slides)


@dataclass
class LoopState:
    """Position of the loop, always that of the last optimiser step.

    ``stage`` is 0 where all stages are trained at once, else the stage being trained, from 1. ``epoch`` counts the
    finished epochs of that stage, ``epochs_seen`` those of all. ``position`` is how many slides of the current
    epoch's order are done. ``fresh_optimizer`` says that the checkpoint's tensors of the optimiser are not to be
    used, because a new stage begins.
    """

    stage: int = 0
    epoch: int = 0
    epochs_seen: int = 0
    position: int = 0
    step: int = 0
    slides_seen: int = 0
    without_improvement: int = 0
    fresh_optimizer: bool = True
    seconds: float = 0.0
    best: Best | None = None
    rate: RateState = field(default_factory=RateState)
    running: RunningLosses = field(default_factory=RunningLosses)
    losses: list[EpochLoss] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, whose floats come back bit by bit."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopState:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, KeyError: the values are not a state.
        """
        best = values["best"]
        parts = {
            "best": None if best is None else Best(**best),
            "rate": RateState(**values["rate"]),
            "running": RunningLosses(**values["running"]),
            "losses": [EpochLoss(**loss) for loss in values["losses"]],
        }
        return cls(**{**values, **parts})


def _added(totals: list[float], values: Sequence[float]) -> list[float]:
    if not totals:
        return [float(value) for value in values]
    return [total + value for total, value in zip(totals, values, strict=True)]
