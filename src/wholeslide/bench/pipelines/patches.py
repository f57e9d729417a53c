"""The patches of a slide, and the network that sees them one by one."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wholeslide.baselines.attention import AttentionMIL
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.patches import PATCH_PX, patch_boxes, tissue_patches
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.pipeline import CLASSES, PIXEL_MEAN, PIXEL_STD, Probabilities, open_tissue
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.network import set_first_stride
from wholeslide.model.weights import create_backbone
from wholeslide.streaming.execution import Execution
from wholeslide.verify import redraw_weights


def patches_of(size: Size) -> list[Box]:
    """Patches that cover a slide of ``size`` pixels at 5x.

    Raises:
        ConfigError: the slide is smaller than a patch.
    """
    if min(size.width, size.height) < PATCH_PX:
        raise ConfigError.single(
            "smaller than a patch", where=f"--sizes {size}", remedy=f"give {PATCH_PX} pixels or more a side"
        )
    return patch_boxes(size, PATCH_PX)


def whole_boxes(case: SpeedCase, *, fast: bool) -> list[Box]:
    """The patches of a case's slide; where all of it is tissue, none is looked for."""
    boxes = patches_of(case.size)
    if case.tissue_fraction == 1:
        return boxes
    with closing(open_tissue(case, fast=fast)) as slide:
        return tissue_patches(slide)


def random_encoder(case: SpeedCase) -> PatchEncoder:
    """The case's backbone and first stride, with weights that the seed decides; what is pooled is its last feature map."""
    backbone = create_backbone(case.backbone)
    set_first_stride(backbone, case.first_stride)
    redraw_weights(backbone, case.seed)
    return PatchEncoder(
        backbone,
        patch_px=PATCH_PX,
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
        execution=Execution("fp32", channels_last=False),
    )


def gated_attention(encoder: PatchEncoder, case: SpeedCase) -> AttentionMIL:
    """The classifier of the encoder's features."""
    features = encoder.backbone.num_features
    assert isinstance(features, int)
    classifier = AttentionMIL(features, CLASSES, gated=True)
    redraw_weights(classifier, case.seed)
    return classifier.eval().requires_grad_(False)


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
