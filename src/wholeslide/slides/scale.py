"""Which scale a slide has, which level is read, and how the working frame lies on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import SlideConfig, is_usable_mpp
from wholeslide.slides.readers import Level, SlideReader, slide_error
from wholeslide.slides.resample import AxisMap, Resampling
from wholeslide.slides.stored_tiles import REDUCTIONS

SAME_SCALE = 0.02
SMALLEST_SIDE_PX = 32


@dataclass(frozen=True)
class Sampling:
    """The whole of a slide at one resolution.

    Attributes:
        level: index of the level that is read.
        reduction: how many of its pixels, along x and y, become one while it is decoded.
        resampling: how working pixels lie on what is read.
        size: the whole slide (its scanned bounds) in working pixels.
        downsample_x: level-0 pixels per working pixel along x; ``downsample_y`` along y.
    """

    level: int
    reduction: int
    resampling: Resampling
    size: Size
    downsample_x: float
    downsample_y: float


def resolve_l0_mpp(reader: SlideReader, config: SlideConfig, mpp: float | None) -> Mpp | None:
    """The scale of level 0: the override, else the manifest's, else the file's own.

    Raises:
        SlideError: the manifest's scale is none that a slide can have.
    """
    if config.mpp_override is not None:
        return Mpp(config.mpp_override, config.mpp_override)
    if mpp is not None:
        if not is_usable_mpp(mpp):
            remedy = "give microns per stored pixel between 0.05 and 20 in the mpp column"
            raise slide_error(f"mpp {mpp:g} is not a slide's scale", reader.path, remedy)
        return Mpp(mpp, mpp)
    return reader.l0_mpp


def working_sampling(reader: SlideReader, config: SlideConfig, l0_mpp: Mpp | None) -> Sampling:
    """How the slide is read at the resolution that the configuration asks for.

    Raises:
        SlideError: the scale is missing, the target is finer than the stored pixels, or the slide is too small.
    """
    target_mpp = config.target_mpp
    if target_mpp is None:
        x = y = float(config.target_downsample)
    elif l0_mpp is None:
        remedy = (
            "give it by --mpp-override or in a manifest's column mpp; "
            "or train on the pixels as stored (--mpp native, or --downsample N)"
        )
        raise slide_error("no usable scale (microns per pixel) in the file", reader.path, remedy)
    else:
        x, y = target_mpp / l0_mpp.x, target_mpp / l0_mpp.y
        _refuse_finer(reader.path, target_mpp, l0_mpp)
    sampling = sample_at(reader, x, y, snap=True)
    if min(sampling.size.width, sampling.size.height) < SMALLEST_SIDE_PX:
        remedy = "leave the slide out, or train at a finer resolution (a smaller --mpp or --downsample)"
        what = f"only {sampling.size} pixels at the working resolution; {SMALLEST_SIDE_PX} a side are needed"
        raise slide_error(what, reader.path, remedy)
    return sampling


def sample_at(
    reader: SlideReader, downsample_x: float, downsample_y: float, *, snap: bool, l0_bounds: Box | None = None
) -> Sampling:
    """The slide at ``downsample_*`` level-0 pixels a pixel, from the coarsest level that is fine enough.

    Args:
        reader: the open slide.
        downsample_x: level-0 pixels per pixel along x, ``downsample_y`` along y.
        downsample_y: see ``downsample_x``.
        snap: where stored pixels, or 2 x 2, 4 x 4 or 8 x 8 of them, are within 2% of the target, use those.
        l0_bounds: the part of level 0 that is covered; left out: what was scanned.
    """
    level = _best_level(reader.levels, downsample_x, downsample_y, SAME_SCALE if snap else 1e-9)
    stored = reader.levels[level]
    ratio_x = _ratio(downsample_x / stored.downsample_x, snap)
    ratio_y = _ratio(downsample_y / stored.downsample_y, snap)
    bounds = _level_bounds(l0_bounds or reader.l0_bounds, stored)
    size = Size(int(bounds.width / ratio_x + 1e-6), int(bounds.height / ratio_y + 1e-6))
    reduction = reader.reduction_for(level, ratio_x, ratio_y)
    if bounds.left % reduction or bounds.top % reduction:
        reduction = 1
    x, y = AxisMap(bounds.left // reduction, ratio_x / reduction), AxisMap(bounds.top // reduction, ratio_y / reduction)
    return Sampling(
        level,
        reduction,
        Resampling(x, y),
        size,
        ratio_x * stored.downsample_x,
        ratio_y * stored.downsample_y,
    )


def _ratio(ratio: float, snap: bool) -> float:
    for whole in REDUCTIONS if snap else ():
        if abs(ratio / whole - 1) <= SAME_SCALE:
            return float(whole)
    return max(1.0, ratio)


def _best_level(levels: tuple[Level, ...], downsample_x: float, downsample_y: float, tolerance: float) -> int:
    fine_enough = [
        index
        for index, level in enumerate(levels)
        if level.downsample_x <= downsample_x * (1 + tolerance) and level.downsample_y <= downsample_y * (1 + tolerance)
    ]
    return max(fine_enough, key=lambda index: levels[index].downsample, default=0)


def _level_bounds(l0_bounds: Box, level: Level) -> Box:
    """The bounds in pixels of a level, inside it."""
    box = Box.from_edges(
        int(l0_bounds.left / level.downsample_x),
        int(l0_bounds.top / level.downsample_y),
        round(l0_bounds.right / level.downsample_x),
        round(l0_bounds.bottom / level.downsample_y),
    )
    return box.intersection(Box.covering(level.size))


def _refuse_finer(path: Path, target_mpp: float, l0_mpp: Mpp) -> None:
    if target_mpp < (1 - SAME_SCALE) * max(l0_mpp.x, l0_mpp.y):
        what = f"{target_mpp:g} microns per pixel asked for, but only {max(l0_mpp.x, l0_mpp.y):.4g} stored"
        remedy = f"leave the slide out, or train at --mpp {max(l0_mpp.x, l0_mpp.y):.4g} or coarser"
        raise slide_error(what, path, remedy)
