"""The classifier of a stage: gated attention over a coarse grid of the stage's features.

The first layer's stride equals its kernel, so that the grid ``z`` of a slide is computed exactly by tiles that are aligned to
it; everything that looks at the whole slide (norm, attention, pooling) happens on the small grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
            return self._grid_by_product(padded, weight)
        return F.conv2d(padded, weight, stride=self.kernel)

    def _grid_by_product(self, x_bchw: Tensor, weight: Tensor) -> Tensor:
        """The same convolution as one product of matrices: its windows do not overlap."""
        batch, channels, height, width = x_bchw.shape
        rows, columns, k = height // self.kernel, width // self.kernel, self.kernel
        windows = x_bchw.permute(0, 2, 3, 1).reshape(batch, rows, k, columns, k, channels).transpose(2, 3)
        z_bhwc = windows.reshape(-1, k * k * channels) @ weight.permute(2, 3, 1, 0).reshape(k * k * channels, -1)
        return z_bhwc.view(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def grid_length(self, cells: int) -> int:
        """Grid cells that cover ``cells`` cells of x_k along one axis."""
        return -(-cells // self.kernel)

    def forward(
        self, z_parts: Sequence[Tensor], count_n: Tensor | None = None, kept_n: Tensor | None = None
    ) -> HeadOutput:
        """Classify a slide from its whole grid, given as rows; cells of the grid that are alike may share one.

        Args:
            z_parts: cells of the grid, (N_1, C), (N_2, C), …; two cells or more in all. Where there are several parts, what a
                part needs on the way back is computed again, so that no more memory is taken than for the largest.
            count_n: how many cells of the grid each row stands for, (N,); by default each stands for one.
            kept_n: the attention weights that survive dropout, counted in the same way; by default all do.
        """
        if count_n is None:
            count_n = torch.cat([torch.ones_like(z_nc[:, 0]) for z_nc in z_parts])
        mean_c, variance_c = _Moments.apply(count_n, *z_parts)
        scale_c = (variance_c + self.norm.eps).rsqrt() * self.norm.weight
        lean = _recomputed if len(z_parts) > 1 else _called
        score_n = torch.cat([lean(self._scores, z_nc, mean_c, scale_c) for z_nc in z_parts])
        score_n = score_n - score_n.detach().max()
        attention_n = score_n.exp() / (count_n @ score_n.exp())
        weights_n = attention_n * (count_n if kept_n is None else kept_n / (1 - self.dropout))
        shares = torch.split(weights_n, [len(z_nc) for z_nc in z_parts])
        parts = zip(z_parts, shares, strict=True)
        pooled = [lean(self._pooled, z_nc, mean_c, scale_c, share) for z_nc, share in parts]
        logits = self.logits(F.relu(self.hidden(torch.stack(pooled).sum(dim=0))))
        return HeadOutput(logits, attention_n)

    def _features(self, z_nc: Tensor, mean_c: Tensor, scale_c: Tensor) -> Tensor:
        return F.relu((z_nc - mean_c) * scale_c + self.norm.bias)

    def _scores(self, z_nc: Tensor, mean_c: Tensor, scale_c: Tensor) -> Tensor:
        features_nc = self._features(z_nc, mean_c, scale_c)
        gated = torch.tanh(self.attention_tanh(features_nc)) * torch.sigmoid(self.attention_gate(features_nc))
        score_n: Tensor = self.attention_score(gated)[:, 0]
        return score_n

    def _pooled(self, z_nc: Tensor, mean_c: Tensor, scale_c: Tensor, weights_n: Tensor) -> Tensor:
        return weights_n @ self._features(z_nc, mean_c, scale_c)


def _called(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Without keeping a graph: the way back computes it again."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


class _Moments(torch.autograd.Function):
    """Mean and variance of each channel, (C,), over rows that come in parts and each count so many times.

    The variance is that about the mean. Nothing but the rows themselves is kept for the way back.
    """

    @staticmethod
    def forward(ctx: Any, count_n: Tensor, *z_parts: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.split(count_n / count_n.sum(), [len(z_nc) for z_nc in z_parts])
        mean_c = torch.stack([share @ z_nc for share, z_nc in zip(shares, z_parts, strict=True)]).sum(dim=0)
        squares = [share @ (z_nc - mean_c).square() for share, z_nc in zip(shares, z_parts, strict=True)]
        ctx.save_for_backward(mean_c, *shares, *z_parts)
        return mean_c, torch.stack(squares).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        mean_c, *saved = ctx.saved_tensors
        shares, z_parts = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        to_mean_c, to_variance_c = outer
        gradients = [
            share[:, None] * (to_mean_c + 2 * to_variance_c * (z_nc - mean_c))
            for share, z_nc in zip(shares, z_parts, strict=True)
        ]
        return None, *gradients


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
