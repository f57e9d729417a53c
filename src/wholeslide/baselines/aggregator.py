"""What every classifier of a bag has: a slide's patches, as features, to one answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BagOutput(NamedTuple):
    """``logits`` of shape (classes,), and the attention of shape (branches, N), each branch's adding up to one, if there is any."""

    logits: Tensor
    attention_bn: Tensor | None = None


class Aggregator(nn.Module, ABC):
    """A classifier of bags of N patch features of width D.

    A subclass is made with the width of the features, the number of classes, two or more, and options of its own that all have
    defaults. Dropout draws from torch's generator, which whoever trains it seeds for each slide.
    """

    @abstractmethod
    def forward(self, bag_nd: Tensor) -> BagOutput:
        """Classify a slide.

        Args:
            bag_nd: features of its patches, (N, D), one or more.
        """

    def loss(self, bag_nd: Tensor, label: int) -> tuple[Tensor, BagOutput]:
        """What training makes small, a scalar, and the answer that it judges; by default the logits' cross entropy."""
        output = self(bag_nd)
        return cross_entropy(output.logits, label), output

    def probabilities(self, output: BagOutput) -> Tensor:
        """Of an answer, (classes,) float64, adding up to one."""
        return torch.softmax(output.logits.detach().double(), dim=0)


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Of one slide's or one patch's logits, (classes,)."""
    return F.cross_entropy(logits[None], torch.tensor([label], device=logits.device))
