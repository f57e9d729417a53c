"""Gated attention over the features of a slide's patches (Ilse et al. 2018, equations 7 and 9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class BagOutput(NamedTuple):
    """``logits`` of shape (classes,) and the attention (N,) of each patch; it sums to one."""

    logits: Tensor
    attention_n: Tensor


class GatedAttentionMIL(nn.Module):
    """A bag of patch features to one slide's logits.

    A layer with ReLU widens or narrows the features; attention is tanh times sigmoid, then a score, then the softmax over all
    patches; the attended mean is classified.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
        width: of the features that are pooled.
        attention_width: of the two branches of attention.
    """

    def __init__(self, features: int, classes: int, *, width: int = 512, attention_width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.attention_tanh = nn.Linear(width, attention_width)
        self.attention_gate = nn.Linear(width, attention_width)
        self.attention_score = nn.Linear(attention_width, 1)
        self.logits = nn.Linear(width, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        """Classify a slide.

        Args:
            bag_nd: features of its patches, (N, D), one or more.
        """
        embedded_nw = torch.relu(self.embedding(bag_nd))
        gated_na = torch.tanh(self.attention_tanh(embedded_nw)) * torch.sigmoid(self.attention_gate(embedded_nw))
        attention_n = torch.softmax(self.attention_score(gated_na)[:, 0], dim=0)
        return BagOutput(self.logits(attention_n @ embedded_nw), attention_n)
