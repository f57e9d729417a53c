"""What a user may choose about patches and their features. Free of heavy imports, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wholeslide.errors import ConfigError, Problem, too_small

Layout = Literal["trident", "clam"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network that turns a slide's patches into features, and which patches it is given.

    Args:
        backbone: A network that timm has, convolutional or not, such as resnet34, vit_small_patch16_224, efficientnet_lite0.
        weights: A file of weights (.safetensors, .pth), "lite0" for the packaged EfficientNet-Lite0, "random" for random
            weights, or nothing for timm's pretrained weights from its hub.
        first_stride: Stride of the backbone's first convolution; by default its own.
        patch: Side of the square patches in pixels at the working resolution.
        least_tissue: Part of a patch that has to be tissue for it to be taken.
        precision: Arithmetic of the network; "auto" measures which is faster on this machine.

    Raises:
        ConfigError: a value is out of range.
    """

    backbone: str = "resnet34"
    weights: str | None = None
    first_stride: int | None = None
    patch: int = 256
    least_tissue: float = 0.5
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        problems = too_small(self, {"first_stride": 1, "patch": 32})
        if not 0 <= self.least_tissue <= 1:
            where = f"--least-tissue {self.least_tissue}"
            problems.append(Problem("not a part of a patch", where, "give a number from 0 to 1"))
        if problems:
            raise ConfigError(problems)
