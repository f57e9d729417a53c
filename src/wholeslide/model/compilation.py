"""Stem and stages that ``torch.compile`` has made into kernels of their own, for prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wholeslide.model.folding import folded_copy
from wholeslide.model.network import LocalNetwork
from wholeslide.model.stages import Stage


class CompiledPart:
    """The stem, or one stage, with its norms folded; compiled when it is first called, for windows of any size.

    Args:
        part: the operations and their weights.
        dtype: of the convolutions' and linear layers' arithmetic, where it is not that of the parameters.
    """

    def __init__(self, part: Stage, dtype: torch.dtype | None) -> None:
        body = folded_copy(part.body)
        for layer in body.modules():
            if dtype is not None and isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(dtype)
        self._body: Any = torch.compile(body, dynamic=True)

    def __call__(self, x_bchw: Tensor) -> Tensor:
        """Normalised pixels to x_0, or x_{k−1} to x_k."""
        output: Tensor = self._body(x_bchw)
        return output


def compiled_parts(network: LocalNetwork, dtype: torch.dtype | None) -> tuple[CompiledPart, ...]:
    """Of the stem and of each stage, in order; see :class:`CompiledPart`."""
    parts = [network.stem, *(network.stage(number) for number in range(1, network.depth + 1))]
    return tuple(CompiledPart(part, dtype) for part in parts)
