"""What ``wholeslide verify`` may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Compare a streamed training step with the unstreamed one.

    Args:
        backbone: A timm network of local operations.
        stages: Number K of stages.
        size: WIDTHxHEIGHT of the random slide in pixels; enlarged where the check would be vacuous.
        tile: Side of a tile in pixels, rounded up for each stage to its grid.
        dtype: Arithmetic of the check; bf16 rounds too coarsely to tell an error from another order of a sum.
        first_stride: Stride of the first convolution; by default 3 for ResNets, and as it is for others.
        seed: Decides weights, slide, regions and dropout.
    """

    backbone: str = "resnet34"
    stages: int = 4
    size: str = "701x623"
    tile: int = 96
    dtype: Literal["fp64", "fp32"] = "fp64"
    first_stride: int | None = None
    seed: int = 0
