"""Random feature reconstruction (RFR): a stage must keep what it takes to rebuild its input, on a few random regions."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.geometry import Box, Size


class FeatureReconstruction(nn.Module):
    """R_k of the paper: a small decoder from x_k to x_{k−1}.

    Args:
        channels: channels of x_k.
        target_channels: channels of x_{k−1}.
        stride: cells of x_{k−1} per cell of x_k.
    """

    def __init__(self, channels: int, target_channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.widen = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        self.to_target = nn.Conv2d(channels, target_channels, 3, padding=1)

    def forward(self, regions_rchw: Tensor) -> Tensor:
        """Regions of x_k, (R, C, h, w), to their reconstructions, (R, C', h·stride, w·stride).

        The norm takes its statistics from all the regions of the slide.
        """
        reconstruction: Tensor = self.to_target(F.relu(self.norm(self.widened(regions_rchw))))
        return reconstruction

    def widened(self, regions_rchw: Tensor) -> Tensor:
        """Regions before the norm, (R, C, h·stride, w·stride)."""
        if self.stride > 1:
            regions_rchw = F.interpolate(
                regions_rchw, scale_factor=float(self.stride), mode="bilinear", align_corners=False
            )
        widened: Tensor = self.widen(regions_rchw)
        return widened

    def rebuilt(self, widened_rchw: Tensor, mean_c: Tensor, variance_c: Tensor) -> Tensor:
        """What :meth:`forward` makes of some of the widened regions, given the moments, (C,), of all of them."""
        assert self.norm.weight is not None
        scale_c = (variance_c + self.norm.eps).rsqrt() * self.norm.weight
        shift_c = self.norm.bias - mean_c * scale_c
        reconstruction: Tensor = self.to_target(F.relu(widened_rchw * scale_c[:, None, None] + shift_c[:, None, None]))
        return reconstruction


def draw_regions(
    rng: np.random.Generator, *, x_size: Size, stride_px: int, view_area_px: int, most: int, region_px: int
) -> list[Box]:
    """Random regions of one slide, all of one size, as boxes of cells of x_k.

    A region is ``region_px`` input pixels a side, clipped to the slide; there are as many as fit into the view's area side by
    side, at least one and at most ``most``.
    """
    side, count = region_side(region_px, stride_px), region_count(view_area_px, region_px, most)
    width, height = min(side, x_size.width), min(side, x_size.height)
    lefts = rng.integers(0, x_size.width - width, size=count, endpoint=True)
    tops = rng.integers(0, x_size.height - height, size=count, endpoint=True)
    return [Box(int(left), int(top), width, height) for left, top in zip(lefts, tops, strict=True)]


def region_side(region_px: int, stride_px: int) -> int:
    """Cells of x_k along a region, before it is clipped to the slide."""
    return max(1, region_px // stride_px)


def region_count(view_area_px: int, region_px: int, most: int) -> int:
    """Regions of a slide."""
    return int(np.clip(view_area_px // region_px**2, 1, most))


def target_box(cell_region: Box, *, stride: int, target_size: Size) -> Box:
    """The cells of x_{k−1} below a region of x_k: short of ``stride`` times the region at an odd border."""
    scaled = Box(
        cell_region.left * stride, cell_region.top * stride, cell_region.width * stride, cell_region.height * stride
    )
    return scaled.intersection(Box.covering(target_size))
