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

from wholeslide.slides.density import OpticalDensity
from wholeslide.slides.planes import Mask, Plane, large_components, strips

SMALLEST_STROKE_CELLS = 8
EDGE_CELLS = 3
FAINT = 0.03
INKS = 4


def pen_mask(density: OpticalDensity) -> Mask:
    """Ink of blue, green, black and red markers.

    Args:
        density: over the glass, at about 8 microns a pixel.

    Returns:
        bool of shape (height, width).
    """
    found = np.empty(density.shape, np.uint8)
    for rows in strips(density.shape):
        found[rows] = _inks(density.strip(rows))
    pen = np.zeros(density.shape, np.bool_)
    for ink in range(INKS):
        _add_strokes(pen, found, ink)
    return pen


def _add_strokes(pen: Mask, found: npt.NDArray[np.uint8], ink: int) -> None:
    """Of an ink: what is large enough to be drawn, and what it may be around that. ``found`` is from :func:`_inks`."""
    core = (found & (1 << ink)) != 0
    if not core.any():
        return
    strokes = large_components(core, SMALLEST_STROKE_CELLS, diagonally=True)
    if strokes.any():
        around = np.logical_or(strokes, found & (1 << INKS + ink), out=core)
        square = ndimage.generate_binary_structure(2, 2)
        pen |= ndimage.binary_dilation(strokes, square, iterations=EDGE_CELLS, mask=around)


def _inks(density_chw: Plane) -> npt.NDArray[np.uint8]:
    """For each ink, the pixels that are surely it (bits 0 to 3), and those that may be its edge or a thin part of it (4 to 7)."""
    red, green, blue = density_chw
    strongest = density_chw.max(axis=0)
    greyness = 1 - (strongest - density_chw.min(axis=0)) / np.maximum(strongest, FAINT)
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
    bits = np.zeros(red.shape, np.uint8)
    cores_and_edges = (blue_core, green_core, black_core, red_core, blue_edge, green_edge, black_edge, red_edge)
    for bit, mask in enumerate(cores_and_edges):
        bits |= mask.view(np.uint8) << bit
    return bits
