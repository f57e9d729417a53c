"""The classifier of a stage: gated attention over a coarse grid of the stage's features.

The first layer's stride equals its kernel, so that the grid ``z`` of a slide is computed exactly by tiles that are aligned to
it; everything that looks at the whole slide (norm, attention, pooling) happens on the small grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
        weight = self.to_grid.weight if weight is None else weight
        if x_bchw.stride(1) == 1:  # channels last
            z_bchw: Tensor = _GridByProduct.apply(padded, weight)
            return z_bchw
        return F.conv2d(padded, weight, stride=self.kernel)

    def grid_length(self, cells: int) -> int:
        """Grid cells that cover ``cells`` cells of x_k along one axis."""
        return -(-cells // self.kernel)

    def forward(
        self, z_parts: Sequence[Tensor], count_n: Tensor | None = None, kept_n: Tensor | None = None
    ) -> HeadOutput:
        """Classify a slide from its whole grid, given as rows; cells of the grid that are alike may share one.

        Args:
            z_parts: cells of the grid, (N_1, C), (N_2, C), …; two cells or more in all.
            count_n: how many cells of the grid each row stands for, (N,); by default each stands for one.
            kept_n: the attention weights that survive dropout, counted in the same way; by default all do.
        """
        if count_n is None:
            count_n = torch.cat([torch.ones_like(z_nc[:, 0]) for z_nc in z_parts])
        moments = Moments.of_rows(z_parts, count_n)
        attention_n = self.attention(torch.cat([self.scores(z_nc, moments) for z_nc in z_parts]), count_n)
        weights_n = self.dropped_out(attention_n, count_n, kept_n)
        shares = torch.split(weights_n, [len(z_nc) for z_nc in z_parts])
        pooled = [self.pooled(z_nc, moments, share) for z_nc, share in zip(z_parts, shares, strict=True)]
        return HeadOutput(self.decided(torch.stack(pooled).sum(dim=0)), attention_n)

    def features(self, z_nc: Tensor, moments: Moments) -> Tensor:
        """Rows behind the norm, (N, C), given the moments of all rows."""
        scale_c = (moments.variance_c + self.norm.eps).rsqrt() * self.norm.weight
        return F.relu((z_nc - moments.mean_c) * scale_c + self.norm.bias)

    def scores(self, z_nc: Tensor, moments: Moments) -> Tensor:
        """Of each row, (N,), before the softmax."""
        features_nc = self.features(z_nc, moments)
        gated = torch.tanh(self.attention_tanh(features_nc)) * torch.sigmoid(self.attention_gate(features_nc))
        score_n: Tensor = self.attention_score(gated)[:, 0]
        return score_n

    def attention(self, score_n: Tensor, count_n: Tensor) -> Tensor:
        """The softmax over all cells, of which each row stands for ``count_n``: (N,), of one cell of each row."""
        exponent_n = (score_n - score_n.detach().max()).exp()
        return exponent_n / (count_n @ exponent_n)

    def dropped_out(self, attention_n: Tensor, count_n: Tensor, kept_n: Tensor | None) -> Tensor:
        """The weight of each row in the pooled sum, (N,)."""
        return attention_n * (count_n if kept_n is None else kept_n / (1 - self.dropout))

    def pooled(self, z_nc: Tensor, moments: Moments, weights_n: Tensor) -> Tensor:
        """Some rows' share of the pooled sum, (C,)."""
        return weights_n @ self.features(z_nc, moments)

    def decided(self, pooled_c: Tensor) -> Tensor:
        """Logits, (classes,), from the pooled sum of all rows."""
        logits: Tensor = self.logits(F.relu(self.hidden(pooled_c)))
        return logits


class _GridByProduct(torch.autograd.Function):
    """A convolution whose stride is its kernel, as one product of matrices: its windows do not overlap.

    The windows are gathered again on the way back, and not kept: a copy of all features.
    """

    @staticmethod
    def forward(ctx: Any, x_bchw: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_bchw, weight)
        batch, _, height, width = x_bchw.shape
        k = weight.shape[-1]
        z_nc = _windows(x_bchw, k) @ _matrix(weight)
        return z_nc.view(batch, height // k, width // k, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_bchw, weight = ctx.saved_tensors
        k, x_gradient, weight_gradient = weight.shape[-1], None, None
        z_nc = outer[0].permute(0, 2, 3, 1).flatten(0, 2)
        if ctx.needs_input_grad[0]:
            batch, channels, height, width = x_bchw.shape
            windows = (z_nc @ _matrix(weight).to(z_nc.dtype).T).view(batch, height // k, width // k, k, k, channels)
            x_gradient = windows.transpose(2, 3).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            matrix = z_nc.T @ _windows(x_bchw, k).to(
                z_nc.dtype
            )  # in the weights' own order: it is added in a seventh of the time
            weight_gradient = matrix.view(-1, k, k, x_bchw.shape[1]).permute(0, 3, 1, 2)
        return x_gradient, weight_gradient


def _windows(x_bchw: Tensor, kernel: int) -> Tensor:
    """Each window of a channels-last tensor as a row, (N, k·k·C)."""
    batch, channels, height, width = x_bchw.shape
    rows, columns = height // kernel, width // kernel
    windows = x_bchw.permute(0, 2, 3, 1).reshape(batch, rows, kernel, columns, kernel, channels).transpose(2, 3)
    return windows.reshape(-1, kernel * kernel * channels)


def _matrix(weight: Tensor) -> Tensor:
    """A convolution's weights in the order of a window's row, (k·k·C, C')."""
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


class Moments(NamedTuple):
    """Mean and variance of each channel, (C,), over rows that each count ``count_n`` times; the variance is that about the mean."""

    count_n: Tensor
    mean_c: Tensor
    variance_c: Tensor

    @classmethod
    def of_rows(cls, z_parts: Sequence[Tensor], count_n: Tensor) -> Moments:
        """Of rows that come in parts, (N_1, C), (N_2, C), …"""
        shares = _shares(count_n, z_parts)
        mean_c = torch.stack([share @ z_nc for share, z_nc in zip(shares, z_parts, strict=True)]).sum(dim=0)
        squares = [share @ (z_nc - mean_c).square() for share, z_nc in zip(shares, z_parts, strict=True)]
        return cls(count_n, mean_c, torch.stack(squares).sum(dim=0))

    def leaves(self) -> Moments:
        """The same without a graph, to gather gradients on."""
        return Moments(self.count_n, self.mean_c.detach().requires_grad_(), self.variance_c.detach().requires_grad_())

    def gradients(self, z_parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """What leaves send on to each part of the rows, one after the other."""
        to_mean_c, to_variance_c = self.mean_c.grad, self.variance_c.grad
        assert to_mean_c is not None
        assert to_variance_c is not None
        for share, z_nc in zip(_shares(self.count_n, z_parts), z_parts, strict=True):
            yield share[:, None] * (to_mean_c + 2 * to_variance_c * (z_nc - self.mean_c.detach()))


def _shares(count_n: Tensor, z_parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each row's part of all that is counted, in the same parts."""
    return torch.split(count_n / count_n.sum(), [len(z_nc) for z_nc in z_parts])


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
