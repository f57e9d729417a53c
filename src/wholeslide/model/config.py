"""What a user may choose about the network."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.errors import ConfigError, Problem, option, too_small

_LEAST = {
    "stages": 1,
    "first_stride": 1,
    "reconstruction_weight": 0,
    "reconstruction_regions": 1,
    "reconstruction_region_px": 1,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained.

    Args:
        backbone: A timm network of local operations, such as resnet34, convnext_tiny, efficientnet_lite0, mobilenetv2_100.
        stages: Number K of consecutive, gradient-isolated stages; 1 is end-to-end training.
        weights: A file of weights (.safetensors, .pth), "lite0" for the packaged EfficientNet-Lite0, "random" to start from
            random weights, or nothing for timm's pretrained weights from its hub.
        first_stride: Stride of the backbone's first convolution; by default 3 for ResNets, and as it is for others.
        frozen: Train the classifiers only.
        freeze_norm_affine: Freeze the affine parameters of the norms too; their statistics are frozen always.
        reconstruction: Train every stage but the last with random feature reconstruction (RFR).
        reconstruction_weight: The weight α of the reconstruction loss.
        reconstruction_regions: Most regions of one slide that are reconstructed.
        reconstruction_region_px: Side of such a region in input pixels.
        attention_dropout: Dropout on the attention weights of every classifier.

    Raises:
        ConfigError: a value is out of range.
    """

    backbone: str = "resnet34"
    stages: int = 4
    weights: str | None = None
    first_stride: int | None = None
    frozen: bool = False
    freeze_norm_affine: bool = False
    reconstruction: bool = True
    reconstruction_weight: float = 1.0
    reconstruction_regions: int = 10
    reconstruction_region_px: int = 768
    attention_dropout: float = 0.2

    def __post_init__(self) -> None:
        problems = too_small(self, _LEAST)
        dropout = self.attention_dropout
        if not 0 <= dropout < 1:
            problems.append(Problem(f"{dropout} is no dropout", option("attention_dropout"), "give 0 or more, below 1"))
        if problems:
            raise ConfigError(problems)
