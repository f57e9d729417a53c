"""A slide's patch features pooled one by one, then a linear layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class Pooling(Aggregator):
    """The mean, or the largest value, of each feature over all patches, then a linear layer.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
        how: which of the two.
    """

    def __init__(self, features: int, classes: int, *, how: Literal["average", "max"] = "average") -> None:
        super().__init__()
        self.how = how
        self.logits = nn.Linear(features, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        return BagOutput(self.logits(bag_nd.amax(dim=0) if self.how == "max" else bag_nd.mean(dim=0)))
