"""What a run's ``--method`` decides: the network, what it sees of a slide, and what trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.staged import StagedNetwork
from wholeslide.slides.config import SlideConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.plan import Plan
from wholeslide.train.config import TrainConfig
from wholeslide.train.learner import Learner, Source
from wholeslide.train.views import ViewSource


@dataclass(frozen=True)
class Tissue:
    """Statistics of the training split's tissue, in [0, 1]: mean and deviation of red, green and blue; mean grey."""

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    mean_grey: float


@dataclass(frozen=True)
class Subject:
    """What a network is built for: the number of ``classes``, the factors on their losses, if any, and the tissue's colours."""

    classes: int
    class_weights: Sequence[float] | None
    tissue: Tissue


class Method(Protocol):
    """A kind of method. ``plans`` says whether its memory is planned."""

    plans: bool

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> StagedNetwork:
        """The network as it is before training; only its structure where not ``pretrained``.

        Raises:
            ModelError: there is no such network, or its weights are not found.
        """

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> Learner[Any]:
        """What trains the network and predicts with it."""

    def source(self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig) -> Source[Any]:
        """How slides are opened for it; ``slides`` says how they are read."""


class StagesMethod:
    """Stages over the whole slide, streamed: locally supervised ones, or one from end to end."""

    plans = True

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> LocalNetwork:
        return build_network(
            config.model_config(),
            classes=subject.classes,
            pixel_mean=subject.tissue.pixel_mean,
            pixel_std=subject.tissue.pixel_std,
            seed=config.seed,
            class_weights=subject.class_weights,
            pretrained=pretrained,
        )

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> StreamingEngine:
        assert isinstance(network, LocalNetwork)
        assert plan is not None
        return StreamingEngine(network, plan, device, store_folder=config.store_dir)

    def source(self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig) -> ViewSource:
        assert isinstance(network, LocalNetwork)
        return ViewSource(
            slides, network.padded_size, config.cache, config.augmentation_config(), subject.tissue.mean_grey
        )


def method_of(config: TrainConfig) -> Method:
    """The kind of a run's method."""
    return StagesMethod()
