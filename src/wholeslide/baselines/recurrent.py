"""A recurrent network over the patches that score highest (Campanella et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class RecurrentMIL(Aggregator):
    """state ← ReLU(W₂ state + W₁ patch) from the first patch to the last, then a linear layer.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
        state_width: of the state, which begins at zero.
    """

    def __init__(self, features: int, classes: int, *, state_width: int = 128) -> None:
        super().__init__()
        self.patch = nn.Linear(features, state_width)
        self.state = nn.Linear(state_width, state_width)
        self.logits = nn.Linear(state_width, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        """Classify a slide by the patches that it is given, in their order, (N, D)."""
        state = bag_nd.new_zeros(self.state.in_features)
        for patch in self.patch(bag_nd):
            state = torch.relu(self.state(state) + patch)
        return BagOutput(self.logits(state))
