"""What a training step takes and gives, streamed or not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from wholeslide.errors import ConfigError
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.stores import FeatureStore


@dataclass(frozen=True)
class StepResult:
    """What a step saw of one slide; lists have an entry for each stage, NaN where a stage was not trained.

    ``probabilities`` is (K, classes), of each stage's classifier, with dropout as in training.
    """

    classification_losses: list[float]
    reconstruction_losses: list[float]
    probabilities: np.ndarray


#: Called with the stage's number, its features as stored (``None`` for the last stage, which keeps none; closed soon after)
#: and its grid: by a step for each stage that is trained, by a prediction for all.
Observer = Callable[[int, FeatureStore | None, Tensor], None]


def chosen_stages(network: LocalNetwork, stages: Collection[int] | None) -> set[int]:
    """The numbers of the stages that are chosen, of all by default.

    Raises:
        ConfigError: there are none, or the network has no such stage.
    """
    every = set(range(1, network.depth + 1))
    chosen = every if stages is None else set(stages)
    if not chosen or not chosen <= every:
        raise ConfigError.single(
            f"no such choice of {network.depth} stages",
            where=f"stages={sorted(chosen)}",
            remedy="name at least one, counted from 1",
        )
    return chosen
