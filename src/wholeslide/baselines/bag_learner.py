"""Trains a classifier of bags, and predicts with it, as the streaming engine does with slides."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator
from wholeslide.baselines.bag import Bag
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.heat import PatchHeat, patch_heat
from wholeslide.draws import Draws
from wholeslide.errors import FeatureError
from wholeslide.model.staged import StagedNetwork
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.step import StepResult


@dataclass(frozen=True, eq=False)
class BagView:
    """A slide as the features of its patches."""

    bag: Bag

    def l0_patches(self) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
        """Upper left corners, (N, 2), and width and height of the patches, in level-0 pixels.

        Raises:
            FeatureError: they came from a file that does not say where they lie.
        """
        corners, side = self.bag.l0_coords_n2, self.bag.l0_patch_px
        if corners is None or side is None:
            what, remedy = "the features do not say where their patches lie", "extract them with coordinates"
            raise FeatureError.single(what, where=str(self.bag.source), remedy=remedy)
        return corners.astype(np.float64), (side, side)

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

    def explain(self, view: BagView) -> Iterator[PatchHeat]:
        """What it looked at, patch by patch."""
        yield patch_heat(self.network.aggregator, self._features(view), number=1)

    def _features(self, view: BagView) -> Tensor:
        return torch.from_numpy(view.bag.features_nd).to(self.device)


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
