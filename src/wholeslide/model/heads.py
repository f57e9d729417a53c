"""The classifier of a stage: gated attention over a coarse grid of the stage's features.

The first layer's stride equals its kernel, so that the grid ``z`` of a slide is computed exactly by tiles that are aligned to
it; everything that looks at the whole slide (norm, attention, pooling) happens on the small grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadOutput(NamedTuple):
    """``logits`` of shape (classes,) and the attention (N,) of one cell of each row, before dropout; all cells sum to one."""

    logits: Tensor
    attention_n: Tensor


class AttentionClassifier(nn.Module):
    """A_k and H of the paper (section 2.1; gated attention of Ilse et al. 2018, equation 9).

    Args:
        channels: channels C of x_k.
        kernel: side k of the cells of x_k that one cell of the grid sees.
        attention_hidden: width of the two attention branches.
        hidden: width of the layer before the logits.
        classes: number of classes.
        dropout: probability with which an attention weight is dropped in training.
    """

    def __init__(
        self, channels: int, *, kernel: int, attention_hidden: int, hidden: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.dropout = dropout
        self.to_grid = nn.Conv2d(channels, channels, kernel, stride=kernel, bias=False)
        self.norm = nn.GroupNorm(channels, channels)
        self.attention_tanh = nn.Linear(channels, attention_hidden)
        self.attention_gate = nn.Linear(channels, attention_hidden)
        self.attention_score = nn.Linear(attention_hidden, 1, bias=False)
        self.hidden = nn.Linear(channels, hidden)
        self.logits = nn.Linear(hidden, classes)

    def grid(self, x_bchw: Tensor, weight: Tensor | None = None) -> Tensor:
        """z of cells of x_k whose upper left corner is aligned to ``kernel``.

        Zeros are added at the right and the bottom up to a multiple of ``kernel``, so that no cell is dropped.

        Args:
            x_bchw: cells of x_k.
            weight: of ``to_grid``, where many tiles share one that was cast before.
        """
        height, width = x_bchw.shape[-2:]
        right, bottom = -width % self.kernel, -height % self.kernel
        padded = F.pad(x_bchw, (0, right, 0, bottom)) if right or bottom else x_bchw
        return F.conv2d(padded, self.to_grid.weight if weight is None else weight, stride=self.kernel)

    def grid_length(self, cells: int) -> int:
        """Grid cells that cover ``cells`` cells of x_k along one axis."""
        return -(-cells // self.kernel)

    def forward(self, z_nc: Tensor, count_n: Tensor | None = None, kept_n: Tensor | None = None) -> HeadOutput:
        """Classify a slide from its whole grid, given as rows; cells of the grid that are alike may share one.

        Args:
            z_nc: cells of the grid, (N, C); two cells or more in all.
            count_n: how many cells of the grid each row stands for, (N,); by default each stands for one.
            kept_n: the attention weights that survive dropout, counted in the same way; by default all do.
        """
        count_n = torch.ones_like(z_nc[:, 0]) if count_n is None else count_n
        features_nc = F.relu(self._normalised(z_nc, count_n))
        gated = torch.tanh(self.attention_tanh(features_nc)) * torch.sigmoid(self.attention_gate(features_nc))
        score_n = self.attention_score(gated)[:, 0]
        score_n = score_n - score_n.detach().max()
        attention_n = score_n.exp() / (count_n @ score_n.exp())
        weights_n = attention_n * (count_n if kept_n is None else kept_n / (1 - self.dropout))
        logits = self.logits(F.relu(self.hidden(weights_n @ features_nc)))
        return HeadOutput(logits, attention_n)

    def _normalised(self, z_nc: Tensor, count_n: Tensor) -> Tensor:
        """The norm of one group a channel: moments over all cells of the grid, each row as often as it stands for a cell."""
        share_n = count_n / count_n.sum()
        centred_nc = z_nc - share_n @ z_nc
        variance_c = share_n @ centred_nc.square()
        return centred_nc * (variance_c + self.norm.eps).rsqrt() * self.norm.weight + self.norm.bias


def head_kernel(stride: int) -> int:
    """The k of a stage whose cells are ``stride`` pixels: 9 up to stride 12, 7 up to 24, else 5."""
    if stride <= 12:
        return 9
    return 7 if stride <= 24 else 5


def auxiliary_classifier(channels: int, stride: int, *, classes: int, dropout: float) -> AttentionClassifier:
    """A_k: sized by the stage's channels and stride."""
    return AttentionClassifier(
        channels,
        kernel=head_kernel(stride),
        attention_hidden=max(1, channels // 2),
        hidden=128,
        classes=classes,
        dropout=dropout,
    )


def final_classifier(channels: int, *, classes: int, dropout: float) -> AttentionClassifier:
    """H: on the last stage's features."""
    return AttentionClassifier(channels, kernel=5, attention_hidden=128, hidden=512, classes=classes, dropout=dropout)
