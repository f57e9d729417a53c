"""Marker ink on a slide, told from tissue by its colour.

Haematoxylin, eosin and the usual chromogens all absorb green light most, or nearly so, and let no colour through
undimmed. Inks do: blue ink lets blue pass and absorbs red more than green, green ink lets green pass, red ink lets red
pass and absorbs blue as much as green, black ink absorbs all alike. The bounds below were set on
2.3 million pixels of H&E (lymphoma, colon, glands) at 2 to 8 microns: each ink's core holds less than a thousandth of
them, scattered.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]

SMALLEST_STROKE_CELLS = 8
EDGE_CELLS = 3
FAINT = 0.03


def pen_mask(density: Plane) -> Mask:
    """Ink of blue, green, black and red markers.

    Args:
        density: optical density over the glass at about 8 microns a pixel, float32 of shape (height, width, 3).

    Returns:
        bool of shape (height, width).
    """
    pen = np.zeros(density.shape[:2], np.bool_)
    for core, edge in _inks(density):
        strokes = _large(core)
        if strokes.any():
            pen |= ndimage.binary_dilation(
                strokes, ndimage.generate_binary_structure(2, 2), iterations=EDGE_CELLS, mask=edge | strokes
            )
    return pen


def _inks(density: Plane) -> list[tuple[Mask, Mask]]:
    """For each ink, the pixels that are surely it, and those that may be its edge or a thin part of it."""
    red, green, blue = np.moveaxis(density, 2, 0)
    strongest = np.maximum(np.maximum(red, green), blue)
    greyness = np.minimum(np.minimum(red, green), blue)  # and then, in its place, one less chroma over strength
    np.subtract(strongest, greyness, out=greyness)
    greyness /= np.maximum(strongest, FAINT)
    np.subtract(1, greyness, out=greyness)
    blue_core = (red > 0.15) & (blue < 0.55 * red) & (red > 0.8 * green)
    blue_edge = (red > FAINT) & (blue < 0.65 * red) & (red > 0.7 * green)
    green_core = (red > 0.15) & (green < 0.8 * red) & (green < 1.1 * blue)
    green_edge = (red > FAINT) & (green < 0.95 * red) & (green < 1.2 * blue)
    black_core = (greyness > 0.95) & (strongest > 0.3)
    black_core |= (greyness > 0.92) & (strongest > 0.5)
    black_core |= (greyness > 0.86) & (strongest > 0.8)
    black_edge = (greyness > 0.7) & (strongest > 2 * FAINT)
    red_core = (green > 0.3) & (blue > 0.77 * green) & (red < 0.22 * green)
    red_core |= (green > 0.25) & (blue > 0.92 * green) & (red < 0.32 * green)
    red_edge = (green > FAINT) & (blue > 0.7 * green) & (red < 0.35 * green)
    return [(blue_core, blue_edge), (green_core, green_edge), (black_core, black_edge), (red_core, red_edge)]


def _large(mask: Mask) -> Mask:
    """Without specks: tissue has single pixels of any colour."""
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, 2))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    large: Mask = (sizes >= SMALLEST_STROKE_CELLS)[labels]
    return large
