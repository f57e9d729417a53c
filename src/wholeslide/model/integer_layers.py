"""Convolutions that multiply 8-bit integers, and what stands between them.

A real number r is kept as an integer q from 0 to 255 with r = scale·(q − zero) (Jacob et al., CVPR 2018, equation 1), weights as
integers from −127 to 127 with a scale for each output channel. A convolution adds the products up exactly in 32 bits, then its
bias and a shortcut, takes the activation, and rounds once. oneDNN does all that in one call.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

_LEVELS = 255
_WEIGHT_LEVELS = 127
_LEAST_SCALE = 1e-12
#: Only a hint for how weights are laid out.
_USUAL_CELLS = 128


class Range(NamedTuple):
    """Which real numbers the integers from 0 to 255 stand for."""

    scale: float
    zero: int


class Rounded(nn.Module):
    """Real numbers to integers."""

    def __init__(self, to: Range) -> None:
        super().__init__()
        self.to_range = to

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, h, w) of any type to uint8, channels last."""
        levels = torch.mul(x_bchw.float(), 1 / self.to_range.scale).add_(self.to_range.zero).round_().clamp_(0, _LEVELS)
        return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


class Real(nn.Module):
    """Integers to the real numbers that they stand for."""

    def __init__(self, source: Range) -> None:
        super().__init__()
        self.source = source

    def forward(self, q_bchw: Tensor) -> Tensor:
        """(B, C, h, w) uint8 to fp32."""
        return q_bchw.float().sub_(self.source.zero).mul_(self.source.scale)


class IntegerProduct(nn.Module):
    """A convolution, a shortcut that is added and the activation behind, in one call: integers to integers.

    Args:
        layer: the convolution, with real weights.
        source: range of its input.
        shortcut: of what is added to its output, or nothing.
        to: range of the result.
        activation: ``none``, ``relu`` or ``hardtanh``.
        bounds: of ``hardtanh``.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        source: Range,
        shortcut: Range | None,
        to: Range,
        activation: str,
        bounds: tuple[float, ...],
    ) -> None:
        super().__init__()
        integers, scales = _rounded_weight(layer.weight.detach().float())
        self._geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
        shape = [1, layer.in_channels, _USUAL_CELLS, _USUAL_CELLS]
        self._weight = torch.ops.onednn.qconv_prepack(integers, scales, *source, *self._geometry, shape)
        self._scales, self._zeros = scales, torch.zeros(layer.out_channels, dtype=torch.int64)
        self._bias = None if layer.bias is None else layer.bias.detach().float()
        self._source, self._shortcut, self._to = source, shortcut, to
        self._activation, self._bounds = activation, list(bounds)

    def forward(self, q_bchw: Tensor, shortcut_bchw: Tensor | None = None) -> Tensor:
        """(B, C, h, w) to (B, C', h', w'), uint8. ``shortcut_bchw`` is overwritten."""
        weights = (self._weight, self._scales, self._zeros)
        if shortcut_bchw is None:
            output: Tensor = torch.ops.onednn.qconv2d_pointwise(
                *(q_bchw, *self._source, *weights, self._bias, *self._geometry, *self._to, torch.uint8),
                *(self._activation, self._bounds, ""),
            )
            return output
        assert self._shortcut is not None
        torch.ops.onednn.qconv2d_pointwise.binary(
            *(q_bchw, *self._source, *weights, shortcut_bchw, self._bias, *self._geometry, *self._to, torch.uint8),
            *(*self._shortcut, "sum", 1.0, self._activation, [], ""),
        )
        return shortcut_bchw


class Normalised(nn.Module):
    """Stored pixels to what a network is trained on.

    Args:
        mean: of the pixels in [0, 1], (3,).
        std: of them, (3,).
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = (value.detach().float().view(1, 3, 1, 1) for value in (mean, std))

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """(B, 3, h, w) uint8 to fp32."""
        return pixels_bchw.sub(255 * self.mean).div_(255 * self.std)


class PixelProduct(nn.Module):
    """The first convolution: multiplies stored pixels as they are, with the normalisation folded into its weights.

    Where the layer pads with zeros, which stand for the mean colour, pixels of that colour lie around the window. The mean is taken
    off with the rounded weights, so that their rounding counts for what differs from it only.

    Args:
        layer: the convolution of normalised pixels.
        normalised: how they would be normalised.
        to: range of the result.
        activation: as of :class:`IntegerProduct`.
        bounds: likewise.
    """

    def __init__(
        self, layer: nn.Conv2d, normalised: Normalised, to: Range, activation: str, bounds: tuple[float, ...]
    ) -> None:
        super().__init__()
        folded = copy.deepcopy(layer)
        weight = layer.weight.detach().float() / normalised.std
        integers, scales = _rounded_weight(weight)
        shift = (integers * scales[:, None, None, None] * normalised.mean).sum(dim=(1, 2, 3))
        folded.weight = nn.Parameter(weight / 255)
        folded.bias = nn.Parameter(-shift if layer.bias is None else layer.bias.detach().float() - shift)
        folded.padding = (0, 0)
        assert not isinstance(layer.padding, str)
        self._padding = layer.padding
        self._mean = (255 * normalised.mean).round().to(torch.uint8)
        self._product = IntegerProduct(folded, Range(1.0, 0), None, to, activation, bounds)

    @staticmethod
    def replaces(layer: nn.Conv2d) -> bool:
        """Whether a convolution of pixels is one that this class computes."""
        return layer.groups == 1

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """(B, 3, h, w) to (B, C, h', w'), uint8."""
        batch, _, height, width = pixels_bchw.shape
        rows, columns = self._padding
        around = self._mean.repeat(batch, 1, height + 2 * rows, width + 2 * columns)
        around = around.contiguous(memory_format=torch.channels_last)
        around[:, :, rows : rows + height, columns : columns + width] = pixels_bchw
        output: Tensor = self._product(around)
        return output


class LargestInteger(nn.Module):
    """Max pooling of integers, along one axis and then along the other: torch's own takes only the smallest maps of bytes.

    Args:
        layer: the pooling, without dilation and not rounding up.
    """

    def __init__(self, layer: nn.MaxPool2d) -> None:
        super().__init__()
        values = (layer.kernel_size, layer.stride, layer.padding)
        self._axes = [[value if isinstance(value, int) else value[axis] for value in values] for axis in (0, 1)]

    @staticmethod
    def replaces(layer: nn.Module) -> bool:
        """Whether a layer is one that this class computes."""
        return isinstance(layer, nn.MaxPool2d) and layer.dilation in (1, (1, 1)) and not layer.ceil_mode

    def forward(self, q_bchw: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h', w'), uint8."""
        for dim, (kernel, stride, padding) in enumerate(self._axes, start=2):
            q_bchw = _largest_along(q_bchw, dim, kernel, stride, padding)
        return q_bchw


def _rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (C', C, h, w) as int8, and what one level of each output channel stands for, (C',)."""
    scales = weight.abs().amax(dim=(1, 2, 3)).div_(_WEIGHT_LEVELS).clamp_(min=_LEAST_SCALE)
    return (weight / scales[:, None, None, None]).round_().to(torch.int8), scales


def _largest_along(q_bchw: Tensor, dim: int, kernel: int, stride: int, padding: int) -> Tensor:
    length = q_bchw.shape[dim]
    count = (length + 2 * padding - kernel) // stride + 1
    shape = list(q_bchw.shape)
    shape[dim] = count
    largest = torch.empty(
        shape, dtype=q_bchw.dtype, memory_format=torch.channels_last
    ).zero_()  # below which is nothing
    for offset in range(-padding, kernel - padding):
        first = max(0, -(offset // stride))  # whose window has a cell at this offset
        seen = min(count, (length - 1 - offset) // stride + 1) - first
        if seen > 0:
            cells = q_bchw.narrow(dim, first * stride + offset, (seen - 1) * stride + 1)
            own = largest.narrow(dim, first, seen)
            torch.maximum(own, cells[:, :, ::stride] if dim == 2 else cells[:, :, :, ::stride], out=own)
    return largest
