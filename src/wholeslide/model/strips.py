"""A convolution whose weights' gradient is summed over strips of rows that stay in the processor's cache.

oneDNN turns both maps around before it multiplies them into the gradient of the weights. On maps of tens of MiB, such as a tile's,
it waits for memory: 270 GFLOP/s were measured where strips of 3 MiB reach 380, and the other two passes 450. In
channels-last layout a strip of rows is one piece of memory, so that none but the first and the last, which are padded, are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Of the larger of a strip's two maps.
_STRIP_BYTES = 3 * 2**20


class StripConv2d(nn.Conv2d):
    """Torch's layer, with strips in the backward pass of a single channels-last map on a CPU."""

    @staticmethod
    def replaces(layer: nn.Module) -> bool:
        """Whether a layer is one that this class computes: dense, wider than one cell, padded with zeros by a number of cells."""
        return (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.kernel_size != (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and layer.padding[0]
            <= layer.dilation[0] * (layer.kernel_size[0] - 1)  # every row of output sees one of input
        )

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        one_piece = len(input) == 1 and input.is_contiguous(memory_format=torch.channels_last)
        casts = torch.is_autocast_enabled("cpu") and self.weight.dtype == torch.float32
        if not one_piece or casts or input.device.type != "cpu" or input.dtype != self.weight.dtype:
            return super().forward(input)
        output: Tensor = _StripConvolution.apply(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, _STRIP_BYTES
        )
        return output


class _StripConvolution(torch.autograd.Function):
    """:func:`torch.nn.functional.conv2d`, with strips of the map in its backward pass, for the weights and the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        input_1chw: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        strip_bytes: int,
    ) -> Tensor:
        ctx.save_for_backward(input_1chw, weight)
        ctx.options, ctx.strip_bytes = (stride, padding, dilation), strip_bytes
        return F.conv2d(input_1chw, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1chw: Tensor) -> tuple[Tensor | None, ...]:
        input_1chw, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        wants_input, *wants = ctx.needs_input_grad[:3]
        gradient_1chw = gradient_1chw.contiguous(memory_format=torch.channels_last)

        def gradients(of: Tensor, seen: Tensor, pad: tuple[int, int], *wanted: bool) -> list[Tensor | None]:
            found: list[Tensor | None] = torch.ops.aten.convolution_backward(
                of, seen, weight, weight.shape[:1], stride, pad, dilation, False, (0, 0), 1, wanted
            )
            return found

        strips = list(_strips(input_1chw, gradient_1chw, weight, ctx.options, ctx.strip_bytes))
        if len(strips) == 1 or not any(wants):
            return *gradients(gradient_1chw, input_1chw, padding, wants_input, *wants), None, None, None, None
        input_gradient = gradients(gradient_1chw, input_1chw, padding, True, False, False)[0] if wants_input else None
        sums: list[Tensor | None] = [None, None]
        for strip in strips:
            seen = input_1chw[:, :, strip.input]
            if any(strip.zeros):
                seen = F.pad(seen, (0, 0, *strip.zeros))
            parts = gradients(gradient_1chw[:, :, strip.output], seen, (0, padding[1]), False, *wants)[1:]
            sums = [_added(total, part) for total, part in zip(sums, parts, strict=True)]
        rounded = [None if total is None else total.to(weight.dtype) for total in sums]
        return input_gradient, *rounded, None, None, None, None


class _Strip(NamedTuple):
    """Rows of the output, the rows of the input that they see, and how many rows of zeros above and below those."""

    output: slice
    input: slice
    zeros: tuple[int, int]


def _strips(
    input_1chw: Tensor, output_1chw: Tensor, weight: Tensor, options: tuple[tuple[int, int], ...], strip_bytes: int
) -> Iterator[_Strip]:
    """Even shares of the output's rows, of at most ``strip_bytes`` in either map, halo apart, and of at least one row."""
    (stride, _), (padding, _), (dilation, _) = options
    input_rows, rows = input_1chw.shape[2], output_1chw.shape[2]
    most = max(1, rows * strip_bytes // max(input_1chw.nbytes, output_1chw.nbytes))
    share = -(-rows // -(-rows // most))
    for begin in range(0, rows, share):
        end = min(begin + share, rows)
        top = begin * stride - padding
        bottom = (end - 1) * stride - padding + dilation * (weight.shape[2] - 1) + 1
        seen = slice(max(top, 0), min(bottom, input_rows))
        yield _Strip(slice(begin, end), seen, (max(-top, 0), max(bottom - input_rows, 0)))


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum, in fp32 at least, of parts that are rounded to the weights' type."""
    if part is None:
        return None
    if total is None:
        return part.to(torch.promote_types(part.dtype, torch.float32))
    return total.add_(part)
