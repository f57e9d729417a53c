"""What an epoch was worth: metrics of each stage's classifier, the monitored score, a loss that does not move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from wholeslide.metrics import LOWER_IS_BETTER, score
from wholeslide.train.state import Best, EpochLoss

METRICS = ("loss", "auroc", "accuracy", "balanced_accuracy", "f1")


@dataclass(frozen=True)
class Score:
    """How good an epoch is: ``value`` is larger for better, ``loss`` breaks ties."""

    value: float
    loss: float

    def better_than(self, best: Best | None) -> bool:
        """Whether this is an improvement. Undefined scores never are, but the first epoch always is the best so far."""
        if best is None:
            return True
        if math.isnan(self.value):
            return False
        if math.isnan(best.score):
            return True
        return (self.value, -self.loss) > (best.score, -best.loss)


def stage_metrics(by_stage: pd.DataFrame, *, classes: Sequence[str], unit: str) -> dict[int, dict[str, float]]:
    """Loss and metrics of every stage's classifier, by stage; ``nan`` where one is undefined."""
    found: dict[int, dict[str, float]] = {}
    for stage, table in by_stage.groupby("stage"):
        predictions = table.drop(columns="stage").reset_index(drop=True)
        found[int(str(stage))] = {name: float(score(predictions, classes, unit, name)) for name in METRICS}
    return found


def monitored(metrics: dict[str, float], monitor: str) -> Score:
    """The score of the chosen metric."""
    value = metrics[monitor]
    return Score(-value if monitor in LOWER_IS_BETTER else value, metrics["loss"])


def does_not_move(losses: Sequence[EpochLoss], *, constant_loss: float) -> bool:
    """Whether a run has learnt nothing: no better than a constant answer, and no better than at its start.

    The mean training loss of the last epoch is compared with ``constant_loss``, what the best constant answer gets,
    and, from the second epoch on, with that of the first epoch; a difference counts if it is more than two
    standard errors and more than 2%.
    """
    if not losses:
        return False
    last, first = losses[-1], losses[0]
    noise = 2 * last.error
    if last.mean < constant_loss - max(noise, 0.02 * constant_loss):
        return False
    if len(losses) == 1:
        return True
    noise = 2 * math.hypot(first.error, last.error)
    return not last.mean < first.mean - max(noise, 0.02 * first.mean)


def grows(losses: Sequence[EpochLoss], *, constant_loss: float) -> bool:
    """Whether a run comes to nothing because its steps are too large: worse than a constant answer, and than at its start."""
    if len(losses) < 2:
        return False
    last, first = losses[-1], losses[0]
    noise = 2 * math.hypot(first.error, last.error)
    return last.mean > max(constant_loss, first.mean) + max(noise, 0.02 * first.mean)


def constant_answer_loss(counts: Sequence[int], class_weights: Sequence[float] | None) -> float:
    """The least mean training loss of an answer that looks at no slide, from the number of slides of each class.

    With weights w the loss is Σ w_c n_c (−log p_c) / n, least at p_c ∝ w_c n_c.
    """
    weights = np.ones(len(counts)) if class_weights is None else np.asarray(class_weights, dtype=np.float64)
    mass = weights * np.asarray(counts, dtype=np.float64)
    share = mass / mass.sum()
    present = share > 0
    return float(-(mass[present] * np.log(share[present])).sum() / np.sum(counts))


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weights inverse to the classes' frequency, with a mean of 1 over the slides: n / (classes · n_c)."""
    total = sum(counts)
    return [total / (len(counts) * count) for count in counts]
