"""What a slide file holds, and a picture of what is taken for its tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from wholeslide.geometry import Box
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.files import write_atomically
from wholeslide.slides.readers import Pixels
from wholeslide.slides.working import WorkingSlide, open_working_slide

OVERLAY_SIDE_PX = 2048
OUTLINE_RGB = {"bright": (0, 160, 0), "dark": (255, 255, 0)}


def inspect_slide(path: Path, config: SlideConfig, *, mpp: float | None = None) -> dict[str, Any]:
    """Open a slide, read pixels of every level, find its tissue, and say what is there.

    Returns:
        ``file, vendor, width, height, levels`` (each ``width, height, downsample``), ``mpp_x, mpp_y`` (``None`` where
        there is no scale), ``tissue_fraction`` of the whole slide, and ``working_width, working_height, working_mpp`` of what a
        network would see: the slide at the working resolution, cropped to its tissue.

    Raises:
        SlideError: see :func:`~wholeslide.slides.working.open_working_slide`.
    """
    slide = open_working_slide(path, config, mpp=mpp)
    try:
        return _describe(path, slide)
    finally:
        slide.close()


def write_overlay(path: Path, out: Path, config: SlideConfig, *, mpp: float | None = None) -> Path:
    """Draw the outline of the tissue mask, and of the crop, on a thumbnail of the slide.

    Returns:
        The PNG that was written, ``out``. It shows the slide only, never its label or macro image.

    Raises:
        SlideError: see :func:`~wholeslide.slides.working.open_working_slide`.
        RunError: the picture cannot be written.
    """
    slide = open_working_slide(path, config, mpp=mpp)
    try:
        picture = draw_overlay(slide)
    finally:
        slide.close()
    with write_atomically(out) as beside:
        Image.fromarray(picture).save(beside, format="PNG")
    return out


def draw_overlay(slide: WorkingSlide, side_px: int = OVERLAY_SIDE_PX) -> Pixels:
    """The whole slide, its longer side at most ``side_px``, with outlines: uint8 of shape (height, width, 3)."""
    picture, step = slide.thumbnail(side_px)
    rows = np.minimum((np.arange(picture.shape[0]) * step + step // 2), slide.whole_size.height - 1)
    columns = np.minimum((np.arange(picture.shape[1]) * step + step // 2), slide.whole_size.width - 1)
    side = slide.mask.px_per_cell
    inside = slide.mask.cells[rows // side][:, columns // side]
    thick = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
    outline = inside & ~ndimage.binary_erosion(inside, thick, border_value=0)
    outline |= _frame(picture, slide.whole_box, step)
    picture[outline] = OUTLINE_RGB["dark" if slide.background_rgb == (0, 0, 0) else "bright"]
    return picture


def _frame(picture: Pixels, whole_box: Box, step: int) -> Any:
    """A dashed line around the crop."""
    frame = np.zeros(picture.shape[:2], np.bool_)
    top, bottom = whole_box.top // step, min((whole_box.bottom - 1) // step, picture.shape[0] - 1)
    left, right = whole_box.left // step, min((whole_box.right - 1) // step, picture.shape[1] - 1)
    dash_x = np.arange(left, right + 1) // 8 % 2 == 0
    dash_y = np.arange(top, bottom + 1) // 8 % 2 == 0
    frame[[top, bottom], left : right + 1] = dash_x
    frame[top : bottom + 1, [left, right]] |= dash_y[:, None]
    return frame


def _describe(path: Path, slide: WorkingSlide) -> dict[str, Any]:
    reader = slide.reader
    l0_mpp, working_mpp = slide.l0_mpp, slide.working_mpp
    return {
        "file": str(path),
        "vendor": reader.vendor,
        "width": reader.l0_size.width,
        "height": reader.l0_size.height,
        "levels": [
            {"width": level.size.width, "height": level.size.height, "downsample": level.downsample}
            for level in reader.levels
        ],
        "mpp_x": l0_mpp.x if l0_mpp else None,
        "mpp_y": l0_mpp.y if l0_mpp else None,
        "tissue_fraction": slide.tissue_fraction,
        "working_width": slide.size.width,
        "working_height": slide.size.height,
        "working_mpp": working_mpp.mean if working_mpp else None,
    }
