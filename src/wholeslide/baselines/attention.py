"""Attention over the features of a slide's patches (Ilse et al. 2018, equations 7 to 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wholeslide.baselines.aggregator import Aggregator, BagOutput


class Attention(nn.Module):
    """Scores of patches: tanh(V h), times sigmoid(U h) where ``gated``, to ``branches`` scores each (equations 8 and 9).

    Args:
        width: of the patches' features h.
        attention_width: of V h and U h.
        gated: whether there is a U.
        branches: number of scores of a patch.
        dropout: on V h and on U h.
    """

    def __init__(
        self, width: int, attention_width: int, *, gated: bool, branches: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.tanh = nn.Linear(width, attention_width)
        self.gate = nn.Linear(width, attention_width) if gated else None
        self.score = nn.Linear(attention_width, branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embedded_nw: Tensor) -> Tensor:
        """The scores, (branches, N), not yet compared over the patches."""
        hidden_na = self.dropout(torch.tanh(self.tanh(embedded_nw)))
        if self.gate is not None:
            hidden_na = hidden_na * self.dropout(torch.sigmoid(self.gate(embedded_nw)))
        scores: Tensor = self.score(hidden_na).T
        return scores


class AttentionMIL(Aggregator):
    """ABMIL and, ``gated``, GABMIL: the patches' mean, weighed by attention, is classified.

    A layer with ReLU widens or narrows the features first.

    Args:
        features: width D of a patch's features.
        classes: number of classes, two or more.
        gated: whether attention is gated.
        width: of the features that are pooled.
        attention_width: of the branches of attention.
    """

    def __init__(
        self, features: int, classes: int, *, gated: bool = False, width: int = 512, attention_width: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.attention = Attention(width, attention_width, gated=gated)
        self.logits = nn.Linear(width, classes)

    def forward(self, bag_nd: Tensor) -> BagOutput:
        embedded_nw = torch.relu(self.embedding(bag_nd))
        attention_bn = torch.softmax(self.attention(embedded_nw), dim=1)
        return BagOutput(self.logits((attention_bn @ embedded_nw)[0]), attention_bn)
