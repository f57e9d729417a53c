"""What a user may choose about the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network that is trained.

    Args:
        backbone: A timm network of local operations, such as resnet34, convnext_tiny, efficientnet_lite0, mobilenetv2_100.
        stages: Number K of consecutive, gradient-isolated stages; 1 is end-to-end training.
        weights: A file of weights (.safetensors, .pth), "lite0" for the packaged EfficientNet-Lite0, "random" to start from
            random weights, or nothing for timm's pretrained weights from its hub.
        first_stride: Stride of the backbone's first convolution; by default 3 for ResNets, and as it is for others.
        freeze_norm_affine: Freeze the affine parameters of the norms too; their statistics are frozen always.
        reconstruction: Train every stage but the last with random feature reconstruction (RFR).
        reconstruction_weight: The weight α of the reconstruction loss.
        reconstruction_regions: Most regions of one slide that are reconstructed.
        reconstruction_region_px: Side of such a region in input pixels.
        attention_dropout: Dropout on the attention weights of every classifier.
    """

    backbone: str = "resnet34"
    stages: int = 4
    weights: str | None = None
    first_stride: int | None = None
    freeze_norm_affine: bool = False
    reconstruction: bool = True
    reconstruction_weight: float = 1.0
    reconstruction_regions: int = 10
    reconstruction_region_px: int = 768
    attention_dropout: float = 0.2
