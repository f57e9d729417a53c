"""Trains a classifier of bags, and predicts with it, as the streaming engine does with slides."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.draws import Draws
from wholeslide.model.staged import StagedNetwork
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.step import StepResult


@dataclass(frozen=True, eq=False)
class BagView:
    """A slide as the features of its patches, float32 of shape (N, D)."""

    features_nd: np.ndarray

    def prefetch(self, limit_bytes: int) -> None:
        """Nothing: they are in memory."""

    def close(self) -> None:
        """Nothing."""


class BagNetwork(StagedNetwork):
    """A classifier of bags, in one part, and the encoder that makes them, which is not trained.

    Args:
        aggregator: the classifier.
        encoder: nothing where bags come from files.
        class_weights: factors on the losses of each class's slides, if any.
    """

    class_weights: Tensor | None

    def __init__(
        self, aggregator: Aggregator, encoder: PatchEncoder | None, class_weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.aggregator, self.encoder = aggregator, encoder
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)

    @property
    def depth(self) -> int:
        return 1

    def normalise_by(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        if self.encoder is not None:
            self.encoder.normalise_by(pixel_mean, pixel_std)

    def backbone_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        return []

    def head_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        return list(self.aggregator.parameters())


class BagLearner:
    """Runs a classifier of bags.

    Args:
        network: moved to ``device``.
        device: where bags are classified.
    """

    def __init__(self, network: BagNetwork, device: torch.device) -> None:
        self.network, self.device = network.to(device), device
        self.plan: Plan | None = None
        self.waited_seconds = 0.0

    def go_on_with(self, plan: Plan) -> None:
        raise AssertionError("a bag has no plan")

    def step(
        self, view: BagView, label: int, draws: Draws, *, weight: float = 1.0, stages: Collection[int] | None = None
    ) -> StepResult:
        """Forward and backward of one bag: adds ``weight`` times the gradient to the parameters' ``.grad``."""
        aggregator = self.network.aggregator.train()
        with seeded(draws, self.device):
            loss, output = aggregator.loss(self._features(view), label)
            if self.network.class_weights is not None:
                loss = loss * self.network.class_weights[label]
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        return StepResult([float(loss.detach())], [math.nan], aggregator.probabilities(output).cpu().numpy()[None])

    @torch.inference_mode()
    def predict(self, view: BagView, *, classifiers: Collection[int] | None = None) -> np.ndarray:
        """Class probabilities, (1, classes) float64."""
        aggregator = self.network.aggregator.eval()
        found: np.ndarray = aggregator.probabilities(aggregator(self._features(view))).cpu().numpy()[None]
        return found

    def _features(self, view: BagView) -> Tensor:
        return torch.from_numpy(view.features_nd).to(self.device)


@contextmanager
def seeded(draws: Draws, device: torch.device) -> Iterator[None]:
    """A block whose dropout is drawn by a slide's own draws; torch's generators are then as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed = int(draws.rng("dropout").integers(2**63))
        torch.default_generator.manual_seed(
            seed
        )  # not torch.manual_seed: for each seed, it records where it was called
        if devices:
            torch.cuda.manual_seed(seed)
        yield
