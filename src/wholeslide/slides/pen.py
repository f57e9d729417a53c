"""Marker ink on a slide, told from tissue by its colour.

Haematoxylin, eosin and the usual chromogens all absorb green light; blue, green and black inks do not look like any
mixture of them, and red ink absorbs green and blue alike and hardly any red.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped]

Mask = npt.NDArray[np.bool_]
SMALLEST_STROKE_CELLS = 12


def pen_mask(thumbnail: npt.NDArray[np.uint8], density: npt.NDArray[np.float32]) -> Mask:
    """Ink of blue, green, black and red markers, with a margin of a cell.

    Args:
        thumbnail: uint8 of shape (height, width, 3), about 8 microns a pixel.
        density: its optical density, float32 of the same shape.

    Returns:
        bool of shape (height, width).
    """
    sure, likely = _ink(density)
    cores = _large(ndimage.binary_opening(sure, np.ones((2, 2), np.bool_)))
    grown: Mask = ndimage.binary_propagation(cores, mask=likely | cores)
    margin: Mask = ndimage.binary_dilation(grown, ndimage.generate_binary_structure(2, 2))
    return margin if grown.any() else grown


def _ink(density: npt.NDArray[np.float32]) -> tuple[Mask, Mask]:
    """Pixels that are ink by their colour, strictly and loosely."""
    red, green, blue = np.moveaxis(density, 2, 0)
    light = 1e-3
    blue_ink = (red > 0.35) & (blue < 0.42 * red) & (red > 0.95 * green)
    blue_edge = (red > 0.08) & (blue < 0.5 * red) & (red > 0.95 * green)
    green_ink = (red > 0.2) & (green < 0.8 * red) & (green < 0.9 * blue + light)
    green_edge = (red > 0.05) & (green < 0.9 * red) & (green < blue + light)
    black_ink = (density.min(axis=2) > 0.55) & (density.max(axis=2) - density.min(axis=2) < 0.3 * density.max(axis=2))
    black_edge = (density.min(axis=2) > 0.1) & (density.max(axis=2) - density.min(axis=2) < 0.3 * density.max(axis=2))
    red_ink = (green > 0.45) & (blue > 0.75 * green) & (red < 0.25 * green)
    red_edge = (green > 0.08) & (blue > 0.75 * green) & (red < 0.35 * green)
    return blue_ink | green_ink | black_ink | red_ink, blue_edge | green_edge | black_edge | red_edge


def _large(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, 2))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    large: Mask = (sizes >= SMALLEST_STROKE_CELLS)[labels]
    return large
