"""Where a slide has tissue: a mask of square cells of working pixels, found without a parameter to tune.

Brightfield: tissue is what has the colour of a stain. Optical density over the glass, Otsu's threshold on its chroma
(Otsu 1979), bounded so that an image full of tissue or of glass is not split in two. Neutral grey (glass edges, dust,
shadows) has no chroma; pen ink is taken out by :mod:`wholeslide.slides.pen`. Dark slides (fluorescence): tissue is what
is brighter than the background's noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped]
from skimage.filters import threshold_otsu

from wholeslide.geometry import Box, Size
from wholeslide.slides.pen import pen_mask
from wholeslide.slides.readers import Pixels

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]

CHROMA_FLOOR = 0.035
CHROMA_CEILING = 0.09
DARK_LEVEL = 50
BRIGHT_LEVEL = 180
SMALLEST_OBJECT_CELLS = 16
SMOOTHING_CELLS = 1.0


@dataclass(frozen=True)
class TissueMask:
    """Which cells hold tissue.

    Attributes:
        cells: bool of shape (rows, columns); the cell of working pixel (x, y) of the whole slide is
            ``cells[y // px_per_cell, x // px_per_cell]``.
        px_per_cell: side of a cell in working pixels.
        size: the whole slide in working pixels; the last cells may reach over it.
    """

    cells: Mask
    px_per_cell: int
    size: Size

    @classmethod
    def everything(cls, size: Size) -> TissueMask:
        """The mask of a slide whose background is kept: one cell that covers it."""
        return cls(np.ones((1, 1), np.bool_), max(size.width, size.height, 1), size)

    @property
    def fraction(self) -> float:
        """The part of the slide's area that is tissue."""
        columns, rows = self._extents()
        return float(rows @ self.cells.astype(np.float64) @ columns) / max(1, self.size.area)

    @property
    def px_bounds(self) -> Box:
        """The smallest box of working pixels that holds all tissue cells; empty where there is none."""
        if not self.cells.any():
            return Box(0, 0, 0, 0)
        rows = np.flatnonzero(self.cells.any(axis=1)) * self.px_per_cell
        columns = np.flatnonzero(self.cells.any(axis=0)) * self.px_per_cell
        box = Box.from_edges(
            int(columns[0]), int(rows[0]), int(columns[-1]) + self.px_per_cell, int(rows[-1]) + self.px_per_cell
        )
        return box.intersection(Box.covering(self.size))

    def covers(self, px_box: Box) -> bool:
        """Whether every pixel of the box is tissue."""
        return bool(self._cells_of(px_box).all())

    def touches(self, px_box: Box) -> bool:
        """Whether any pixel of the box is tissue."""
        return bool(self._cells_of(px_box).any())

    def pixels(self, px_box: Box) -> Mask:
        """The mask of a box of working pixels, bool of shape (height, width)."""
        rows = np.arange(px_box.top, px_box.bottom) // self.px_per_cell
        columns = np.arange(px_box.left, px_box.right) // self.px_per_cell
        mask: Mask = self.cells[rows][:, columns]
        return mask

    def _cells_of(self, px_box: Box) -> Mask:
        side = self.px_per_cell
        return self.cells[
            px_box.top // side : -(-px_box.bottom // side), px_box.left // side : -(-px_box.right // side)
        ]

    def _extents(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """How many working pixels each column and each row of cells covers."""
        rows, columns = self.cells.shape
        widths = np.clip(self.size.width - np.arange(columns) * self.px_per_cell, 0, self.px_per_cell)
        heights = np.clip(self.size.height - np.arange(rows) * self.px_per_cell, 0, self.px_per_cell)
        return widths.astype(np.float64), heights.astype(np.float64)


def is_dark(thumbnail: Pixels, scanned: Mask) -> bool:
    """Whether the slide has a dark background, as in fluorescence.

    Black padding around a brightfield scan does not make it dark: there, glass is near white.
    """
    pixels = thumbnail[scanned]
    if pixels.size == 0:
        return False
    dark = np.mean(pixels.max(axis=1) < DARK_LEVEL)
    bright = np.mean(pixels.min(axis=1) > BRIGHT_LEVEL)
    return bool(dark > 0.3 and bright < 0.02)


def find_tissue(thumbnail: Pixels, scanned: Mask) -> Mask:
    """Tissue of a thumbnail of about 8 microns a pixel.

    Args:
        thumbnail: uint8 of shape (height, width, 3).
        scanned: bool of shape (height, width), false where the scanner took no picture.

    Returns:
        bool of shape (height, width).
    """
    mask = _find_fluorescence(thumbnail) if is_dark(thumbnail, scanned) else _find_stain(thumbnail, scanned)
    return _tidy(mask & scanned) & scanned


def optical_density(thumbnail: Pixels, scanned: Mask) -> Plane:
    """-log10 of transmitted light relative to the glass; float32 of shape (height, width, 3), at least 0."""
    pixels = thumbnail[scanned] if scanned.any() else thumbnail.reshape(-1, 3)
    bright = pixels[pixels.min(axis=1) > BRIGHT_LEVEL]
    glass = (
        np.median(bright[bright.sum(axis=1) >= np.percentile(bright.sum(axis=1), 50)], axis=0) if len(bright) else 255
    )
    glass = np.maximum(np.asarray(glass, np.float32), 200.0)
    density: Plane = -np.log10((thumbnail.astype(np.float32) + 1) / (glass + 1))
    return np.maximum(density, 0)


def _find_stain(thumbnail: Pixels, scanned: Mask) -> Mask:
    smoothed = ndimage.gaussian_filter(thumbnail.astype(np.float32), (SMOOTHING_CELLS, SMOOTHING_CELLS, 0))
    density = optical_density(smoothed.round().astype(np.uint8), scanned)
    chroma = density.max(axis=2) - density.min(axis=2)
    pen = pen_mask(thumbnail, density)
    usable = scanned & ~pen
    if not usable.any():
        return np.zeros_like(scanned)
    threshold = _bounded_otsu(chroma[usable], CHROMA_FLOOR, CHROMA_CEILING)
    mask: Mask = (chroma > threshold) & ~pen
    return mask


def _find_fluorescence(thumbnail: Pixels) -> Mask:
    light = ndimage.gaussian_filter(thumbnail.max(axis=2).astype(np.float32), SMOOTHING_CELLS)
    background = float(np.percentile(light, 10))
    noise = 1.4826 * float(np.median(np.abs(light[light <= np.median(light)] - background)))
    floor = background + max(4.0, 4 * noise)
    threshold = 10 ** _bounded_otsu(np.log10(light[light > 0] + 1), np.log10(floor + 1), np.log10(2 * floor + 1)) - 1
    mask: Mask = light > threshold
    return mask


def _bounded_otsu(values: npt.NDArray[np.floating], floor: float, ceiling: float) -> float:
    if values.size == 0 or float(values.max()) <= floor:
        return floor
    return float(np.clip(threshold_otsu(values), floor, ceiling))  # type: ignore[no-untyped-call]


def _tidy(mask: Mask) -> Mask:
    """Close gaps, drop specks, fill holes, and keep a margin of a cell."""
    if not mask.any():
        return mask
    disk = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
    padded = np.pad(mask, 4, mode="edge")
    closed: Mask = ndimage.binary_closing(padded, disk)[4:-4, 4:-4]
    labels, count = ndimage.label(closed, ndimage.generate_binary_structure(2, 2))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept: Mask = (sizes >= SMALLEST_OBJECT_CELLS)[labels]
    kept = _fill_small_holes(kept)
    grown: Mask = ndimage.binary_dilation(kept, ndimage.generate_binary_structure(2, 1))
    return grown


def _fill_small_holes(mask: Mask, largest_cells: int = 256) -> Mask:
    labels, count = ndimage.label(~mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = largest_cells + 1
    filled: Mask = mask | (sizes <= largest_cells)[labels]
    return filled
