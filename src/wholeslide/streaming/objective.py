"""The part of a stage's loss that looks at the whole slide: equation 1 of the paper, on the grid and on the regions.

The streaming engine and its whole-slide reference share it; they differ only in how x_k and z come about and how gradients
flow back into the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.model.reconstruction import draw_regions, target_box
from wholeslide.streaming.grid import GridLayout


@dataclass(frozen=True)
class StageObjective:
    """L_k of one slide. ``number`` is k, counted from 1; ``view_size`` is in pixels."""

    network: LocalNetwork
    number: int
    label: int
    draws: Draws
    view_size: Size

    def survivors(self, layout: GridLayout, like: Tensor) -> Tensor | None:
        """How many of each row's cells dropout keeps, (N,); nothing where there is no dropout."""
        head = self.network.head(self.number)
        if head.dropout == 0:
            return None
        rng = self.draws.rng("dropout", stage=self.number)
        kept_hw = rng.random((layout.size.height, layout.size.width)) >= head.dropout
        return layout.survivors(kept_hw, like)

    def classification(self, z_parts: Sequence[Tensor], layout: GridLayout) -> tuple[Tensor, Tensor]:
        """The classification loss and the class probabilities (classes,), from the whole grid, its rows in parts."""
        kept_n = self.survivors(layout, z_parts[0])
        return self.decision(self.network.head(self.number)(z_parts, layout.counts(z_parts[0]), kept_n).logits)

    def decision(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the logits."""
        return self.network.classification_loss(logits, self.label), torch.softmax(logits.detach().double(), dim=0)

    def regions(self, x_size: Size) -> list[Box]:
        """The cells of x_k that are reconstructed; none where the stage has no decoder."""
        config = self.network.config
        if self.network.decoder(self.number) is None:
            return []
        return draw_regions(
            self.draws.rng("regions", stage=self.number),
            x_size=x_size,
            stride_px=self.network.stage(self.number).stride,
            view_area_px=self.view_size.area,
            most=config.reconstruction_regions,
            region_px=config.reconstruction_region_px,
        )

    def target_boxes(self, cell_regions: list[Box], target_size: Size) -> list[Box]:
        """The cells of x_{k−1} below the regions."""
        stride = self.network.stage(self.number).locality.stride
        return [target_box(region, stride=stride, target_size=target_size) for region in cell_regions]

    def reconstruction(self, regions_rchw: Tensor, targets_bchw: list[Tensor]) -> Tensor:
        """The reconstruction loss: the mean over all cells of all the regions' targets, before its weight α."""
        decoder = self.network.decoder(self.number)
        assert decoder is not None
        pairs = zip(decoder(regions_rchw), targets_bchw, shares_of_cells(targets_bchw), strict=True)
        losses = [self.region_loss(decoded_chw, target[0]) * share for decoded_chw, target, share in pairs]
        return torch.stack(losses).sum()

    def region_loss(self, decoded_chw: Tensor, target_chw: Tensor) -> Tensor:
        """The loss of one region, the mean over its target's cells."""
        wanted = target_chw.to(head_dtype(target_chw.dtype))
        decoded = decoded_chw[:, : wanted.shape[-2], : wanted.shape[-1]].to(wanted.dtype)
        return self.network.reconstruction_loss(decoded, wanted)


def shares_of_cells(targets_bchw: Sequence[Tensor]) -> list[float]:
    """Each target's part of all their cells."""
    cells = np.array([target.shape[-2] * target.shape[-1] for target in targets_bchw], dtype=np.float64)
    shares: list[float] = (cells / cells.sum()).tolist()
    return shares


def head_dtype(features: torch.dtype) -> torch.dtype:
    """What is small and global is computed at least in fp32."""
    return torch.promote_types(features, torch.float32)
