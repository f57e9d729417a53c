"""The patches of a slide, and the network that sees them one by one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wholeslide.baselines.attention import AttentionMIL
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.pipeline import CLASSES, PIXEL_MEAN, PIXEL_STD, Probabilities, open_tissue
from wholeslide.bench.slide_reads import PATCH_PX
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.network import set_first_stride
from wholeslide.model.weights import create_backbone
from wholeslide.slides.working import WorkingSlide
from wholeslide.verify import redraw_weights

#: Of a patch's pixels, what has to be tissue.
_LEAST_TISSUE = 0.5


def patches_of(size: Size) -> list[Box]:
    """Patches that cover a slide of ``size`` pixels at 5x, row by row; the last of a row and a column are shifted inwards.

    Raises:
        ConfigError: the slide is smaller than a patch.
    """
    if min(size.width, size.height) < PATCH_PX:
        raise ConfigError.single(
            "smaller than a patch", where=f"--sizes {size}", remedy=f"give {PATCH_PX} pixels or more a side"
        )
    tops, lefts = (_starts(length) for length in (size.height, size.width))
    return [Box(left, top, PATCH_PX, PATCH_PX) for top in tops for left in lefts]


def _starts(length: int) -> list[int]:
    return [min(start, length - PATCH_PX) for start in range(0, length, PATCH_PX)]


def tissue_patches(slide: WorkingSlide) -> list[Box]:
    """Those of a slide of which at least half is tissue, in pixels of the whole slide.

    Raises:
        ConfigError: the slide is smaller than a patch, or no patch has so much tissue.
    """
    boxes = patches_of(slide.whole_size)
    if slide.background == "constant":
        boxes = [box for box in boxes if slide.mask.pixels(box).mean() >= _LEAST_TISSUE]
    if not boxes:
        raise ConfigError.single(
            "no patch that is half tissue", where="--tissue-fractions", remedy="give larger --sizes or fractions"
        )
    return boxes


def whole_boxes(case: SpeedCase, *, fast: bool) -> list[Box]:
    """The patches of a case's slide; where all of it is tissue, none is looked for."""
    if case.tissue_fraction == 1:
        return patches_of(case.size)
    slide = open_tissue(case, fast=fast)
    try:
        return tissue_patches(slide)
    finally:
        slide.close()


class PatchEncoder(nn.Module):
    """A patch's features: the backbone's last feature map, averaged.

    Args:
        case: backbone, first stride, and the seed of the weights.
    """

    def __init__(self, case: SpeedCase) -> None:
        super().__init__()
        self.backbone = create_backbone(case.backbone)
        set_first_stride(self.backbone, case.first_stride)
        redraw_weights(self.backbone, case.seed)
        self.eval().requires_grad_(False)

    def forward(self, patches_bchw: Tensor) -> Tensor:
        """Normalised patches, (B, 3, 256, 256), to features, (B, D)."""
        features_bchw: Tensor = self.backbone(patches_bchw)
        return features_bchw.float().mean(dim=(2, 3))


def gated_attention(encoder: PatchEncoder, case: SpeedCase) -> AttentionMIL:
    """The classifier of the encoder's features."""
    features = encoder.backbone.num_features
    assert isinstance(features, int)
    classifier = AttentionMIL(features, CLASSES, gated=True)
    redraw_weights(classifier, case.seed)
    return classifier.eval().requires_grad_(False)


def normalised(patches_bhwc: np.ndarray | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stored pixels, (B, 256, 256, 3) uint8, as the encoder takes them: (B, 3, 256, 256), channels last in memory."""
    pixels = torch.as_tensor(patches_bhwc).to(torch.float32)
    pixels = pixels.sub_(255 * torch.tensor(PIXEL_MEAN)).div_(255 * torch.tensor(PIXEL_STD))
    return pixels.to(dtype).permute(0, 3, 1, 2)


def probabilities(classifier: AttentionMIL, features: list[Tensor]) -> Probabilities:
    """Of a slide whose patches' features come in batches, (B, D)."""
    logits = classifier(torch.cat(features).float()).logits
    found: Probabilities = torch.softmax(logits.double(), dim=0).numpy()
    return found


def bag_flops(encoder: PatchEncoder, classifier: AttentionMIL, patches: int) -> int:
    """Multiplications and additions of a slide of so many patches."""
    with torch.no_grad(), FlopCounterMode(display=False) as of_a_patch:
        features = encoder(torch.zeros(1, 3, PATCH_PX, PATCH_PX))
    with torch.no_grad(), FlopCounterMode(display=False) as of_the_bag:
        classifier(features.expand(patches, -1))
    return patches * int(of_a_patch.get_total_flops()) + int(of_the_bag.get_total_flops())
