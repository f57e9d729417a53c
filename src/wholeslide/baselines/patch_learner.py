"""Trains an encoder on patches of slides and then, when its weights no longer change, a classifier of what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.baselines.aggregator import Aggregator
from wholeslide.baselines.bag_learner import seeded
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.heat import PatchHeat, patch_heat
from wholeslide.baselines.patch_view import PatchView
from wholeslide.baselines.registry import PatchRule
from wholeslide.draws import Draws
from wholeslide.model.staged import StagedNetwork
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.step import StepResult

ENCODER, AGGREGATOR = 1, 2
"""The two parts."""


class PatchNetwork(StagedNetwork):
    """Part 1: an encoder and a classifier of single patches. Part 2: a classifier of a slide's features.

    Statistics of batch norms stay as they are in the encoder's weights.

    Args:
        encoder: trained in part 1.
        patch_classifier: the features of patches, (N, D), to logits, (N, classes).
        aggregator: trained in part 2.
        rule: which patches of a slide are taken.
        class_weights: factors on the losses of each class's slides, if any.
        freeze_norm_affine: whether scales and shifts of the encoder's norms stay as they are, too.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        encoder: PatchEncoder,
        patch_classifier: nn.Linear,
        aggregator: Aggregator,
        rule: PatchRule,
        *,
        class_weights: Sequence[float] | None = None,
        freeze_norm_affine: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.patch_classifier, self.aggregator, self.rule = encoder, patch_classifier, aggregator, rule
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights)
        for module in encoder.modules():
            norm = isinstance(module, nn.BatchNorm2d | nn.LayerNorm)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not (norm and freeze_norm_affine))

    @property
    def depth(self) -> int:
        return 2

    def normalise_by(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        self.encoder.normalise_by(pixel_mean, pixel_std)

    def backbone_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        if stage == AGGREGATOR:
            return []
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]

    def head_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        heads = {ENCODER: self.patch_classifier, AGGREGATOR: self.aggregator}
        return [parameter for part, head in heads.items() if stage in (None, part) for parameter in head.parameters()]

    def ranks(self, probabilities_nc: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Positions of patches, (N,), the highest-scoring first; of equal ones the first in the slide.

        With two classes the score is the probability of the last, as published; with more, that of the likeliest class.
        """
        two = probabilities_nc.shape[1] == 2
        scores_n = probabilities_nc[:, -1] if two else probabilities_nc.max(axis=1)
        return np.argsort(-scores_n, kind="stable")


class PatchLearner:
    """Runs a network of patches, in batches of a bounded number of them.

    Args:
        network: moved to ``device``.
        device: where patches are computed.
    """

    def __init__(self, network: PatchNetwork, device: torch.device) -> None:
        self.network, self.device = network.to(device), device
        self.plan: Plan | None = None
        self.waited_seconds = 0.0
        self._encoder_is_done = False  # as it is from the first step of part 2 on

    def go_on_with(self, plan: Plan) -> None:
        raise AssertionError("patches have no plan")

    def step(
        self, view: PatchView, label: int, draws: Draws, *, weight: float = 1.0, stages: Collection[int] | None = None
    ) -> StepResult:
        """Forward and backward of one slide, in one part: adds ``weight`` times the gradient to the parameters' ``.grad``."""
        assert stages is not None
        (part,) = stages
        self._encoder_is_done = part == AGGREGATOR
        with seeded(draws, self.device):
            if part == ENCODER:
                loss, found = self._patch_loss(view, label, draws)
            else:
                loss, found = self._slide_loss(view, label)
            if self.network.class_weights is not None:
                loss = loss * self.network.class_weights[label]
            (loss * weight).backward()  # type: ignore[no-untyped-call]
        self.waited_seconds = view.waited_seconds
        losses, probabilities = [math.nan, math.nan], np.full((2, len(found)), np.nan)
        losses[part - 1], probabilities[part - 1] = float(loss.detach()), found
        return StepResult(losses, [math.nan, math.nan], probabilities)

    @torch.inference_mode()
    def predict(self, view: PatchView, *, classifiers: Collection[int] | None = None) -> np.ndarray:
        """Class probabilities of the two parts, (2, classes) float64, NaN where one was not asked.

        Part 1 judges a slide by its first patch where patches are ranked, else by the mean over its patches.
        """
        asked = (ENCODER, AGGREGATOR) if classifiers is None else classifiers
        features_nd = self._features(view)
        probabilities_nc = self._patch_probabilities(features_nd)
        found = np.full((2, probabilities_nc.shape[1]), np.nan)
        if ENCODER in asked:
            found[0] = self._slide_probabilities(probabilities_nc)
        if AGGREGATOR in asked:
            aggregator = self.network.aggregator.eval()
            output = aggregator(self._seen(features_nd, probabilities_nc))
            found[1] = aggregator.probabilities(output).cpu().numpy()
        self.waited_seconds = view.waited_seconds
        return found

    def explain(self, view: PatchView) -> Iterator[PatchHeat]:
        """What each part looked at, patch by patch: part 1 at each for itself, part 2 at those that it was given."""
        features_nd = self._features(view)
        probabilities_nc = self._patch_probabilities(features_nd)
        with torch.no_grad():
            weight_cd = self.network.patch_classifier.weight
            evidence_cn = (weight_cd @ features_nd.T).float().cpu().numpy()
        yield PatchHeat(ENCODER, self._slide_probabilities(probabilities_nc), None, evidence_cn)
        chosen = self._chosen(probabilities_nc)
        found = patch_heat(self.network.aggregator, features_nd[chosen], number=AGGREGATOR)
        count = len(features_nd)
        attention_bn = None if found.attention_bn is None else _spread(found.attention_bn, chosen, count)
        yield replace(found, attention_bn=attention_bn, evidence_cn=_spread(found.evidence_cn, chosen, count))

    def _patch_loss(self, view: PatchView, label: int, draws: Draws) -> tuple[Tensor, npt.NDArray[np.float64]]:
        """Part 1's loss, the mean over the patches that are taught, and what is said of the slide."""
        encoder = self.network.encoder
        patches_bhwc = view.varied(self._taught(view, draws), draws)
        with encoder.execution.autocast(self.device):
            features_nd = encoder(encoder.execution.arrange(encoder.to_input(patches_bhwc)))
        logits_nc = self.network.patch_classifier(features_nd)
        labels_n = torch.full((len(logits_nc),), label, device=self.device)
        return F.cross_entropy(logits_nc, labels_n), self._slide_probabilities(_probabilities(logits_nc))

    def _slide_loss(self, view: PatchView, label: int) -> tuple[Tensor, npt.NDArray[np.float64]]:
        """Part 2's loss, and what is said of the slide."""
        aggregator = self.network.aggregator.train()
        features_nd = self._features(view)
        loss, output = aggregator.loss(self._seen(features_nd, self._patch_probabilities(features_nd)), label)
        return loss, aggregator.probabilities(output).cpu().numpy()

    def _taught(self, view: PatchView, draws: Draws) -> list[int]:
        """The patches that part 1 learns from at this step."""
        rule, count = self.network.rule, len(view.boxes)
        if rule.ranked:
            probabilities_nc = self._patch_probabilities(self._features(view))
            chosen = self.network.ranks(probabilities_nc)[: rule.taught]
        else:
            chosen = draws.rng("patches").choice(count, size=min(count, rule.taught), replace=False)
        return [int(number) for number in chosen]

    def _features(self, view: PatchView) -> Tensor:
        """Of all patches as they are, (N, D)."""
        if self._encoder_is_done:
            return torch.from_numpy(view.kept_features()).to(self.device)
        with closing(view.batches()) as batches:
            encoded = [self.network.encoder.encode(patches_bhwc) for patches_bhwc in batches]
        return torch.from_numpy(np.concatenate(encoded)).to(self.device)

    @torch.no_grad()
    def _patch_probabilities(self, features_nd: Tensor) -> npt.NDArray[np.float64]:
        """What the classifier of part 1 says of each patch, (N, classes)."""
        return _probabilities(self.network.patch_classifier(features_nd))

    def _slide_probabilities(self, probabilities_nc: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What part 1 says of a slide, (classes,), from what it says of patches."""
        if self.network.rule.ranked:
            first: npt.NDArray[np.float64] = probabilities_nc[self.network.ranks(probabilities_nc)[0]]
            return first
        mean: npt.NDArray[np.float64] = probabilities_nc.mean(axis=0)
        return mean

    def _seen(self, features_nd: Tensor, probabilities_nc: npt.NDArray[np.float64]) -> Tensor:
        """What part 2 is given of the features of all patches."""
        return features_nd[self._chosen(probabilities_nc)]

    def _chosen(self, probabilities_nc: npt.NDArray[np.float64]) -> Tensor:
        """Positions of the patches that part 2 is given: the highest-scoring, the first in front, or all in the slide's order."""
        rule, count = self.network.rule, len(probabilities_nc)
        chosen = self.network.ranks(probabilities_nc)[: rule.highest] if rule.ranked else np.arange(count)
        return torch.from_numpy(chosen).to(self.device)


def _spread(values_bn: npt.NDArray[np.float32], chosen: Tensor, count: int) -> npt.NDArray[np.float32]:
    """Values of some patches among all ``count`` of them; the others' are zero."""
    spread_bn = np.zeros((len(values_bn), count), np.float32)
    spread_bn[:, chosen.cpu().numpy()] = values_bn
    return spread_bn


def _probabilities(logits_nc: Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = torch.softmax(logits_nc.detach().double(), dim=1).cpu().numpy()
    return found
