"""A slide's patch features pooled one by one, then a linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class MaxPooling(Aggregator):
    """The largest value of each feature over all patches, then a linear layer.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(features, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        return BagOutput(self.logits(bag_nd.amax(dim=0)))


class AveragePooling(Aggregator):
    """The mean of each feature over all patches, then a linear layer.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(features, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        return BagOutput(self.logits(bag_nd.mean(dim=0)))
