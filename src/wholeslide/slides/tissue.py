"""Where a slide has tissue: a mask of square cells of working pixels, found without a parameter to tune.

Brightfield: tissue is what has the colour of a stain. Optical density over the glass, Otsu's threshold on its chroma
(Otsu 1979), bounded so that an image full of tissue or of glass is not split in two. Neutral grey (glass edges, dust,
shadows) has no chroma; pen ink is taken out by :mod:`wholeslide.slides.pen`. Dark slides (fluorescence): tissue is what
is brighter than the background's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.filters import threshold_otsu

from wholeslide.geometry import Box, Size
from wholeslide.slides.pen import pen_mask
from wholeslide.slides.readers import Pixels

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]
_Number = TypeVar("_Number", bound=np.generic)

DARK_LEVEL = 50
BRIGHT_LEVEL = 180
GLASS_LEVEL = 200
GLASS_TINT = 24
ASSUMED_GLASS = 245
GLASS_DENSITY = 0.03
DENSE = 0.25
GREY_PART = 0.08
CHROMA_LOW = 0.02
CHROMA_HIGH = 0.06
SMALLEST_OBJECT_CELLS = 16
SMOOTHING_CELLS = 0.7
NUCLEI_CELLS = 4.0


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
    if not scanned.any():
        return False
    dark = np.mean(_largest(thumbnail)[scanned] < DARK_LEVEL)
    bright = np.mean(_smallest(thumbnail)[scanned] > BRIGHT_LEVEL)
    return bool(dark > 0.3 and bright < 0.02)


def _largest(image_hwc: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Of each pixel's three channels; many times as fast as numpy's ``max`` along so short an axis."""
    red, green, blue = np.moveaxis(image_hwc, 2, 0)
    largest: npt.NDArray[_Number] = np.maximum(np.maximum(red, green), blue)
    return largest


def _smallest(image_hwc: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    """Likewise."""
    red, green, blue = np.moveaxis(image_hwc, 2, 0)
    smallest: npt.NDArray[_Number] = np.minimum(np.minimum(red, green), blue)
    return smallest


def find_tissue(thumbnail: Pixels, scanned: Mask) -> Mask:
    """Tissue of a thumbnail of about 8 microns a pixel.

    Args:
        thumbnail: uint8 of shape (height, width, 3).
        scanned: bool of shape (height, width), false where the scanner took no picture.

    Returns:
        bool of shape (height, width).
    """
    if is_dark(thumbnail, scanned):
        return _tidy(_find_fluorescence(thumbnail, scanned)) & scanned
    density = optical_density(thumbnail, scanned)
    pen = pen_mask(density)
    return _tidy(_find_stain(density, scanned & ~pen)) & scanned & ~pen


def optical_density(thumbnail: Pixels, scanned: Mask) -> Plane:
    """-log10 of transmitted light relative to the glass, at least 0; float32 of shape (height, width, 3).

    The glass is what is bright and neutral; where next to nothing is (an image full of tissue), it is assumed white.
    """
    largest, smallest = _largest(thumbnail), _smallest(thumbnail)
    bright = scanned & (smallest >= GLASS_LEVEL) & (largest - smallest <= GLASS_TINT)
    glass = np.full(3, ASSUMED_GLASS, np.float32)
    if bright.sum() >= 0.01 * scanned.sum():
        light = thumbnail.sum(axis=2, dtype=np.int32)
        brightest = bright & (light >= np.median(light[bright]))
        glass = np.median(thumbnail[brightest], axis=0).astype(np.float32)
    density = thumbnail.astype(np.float32)  # of a large slide hundreds of MiB: there is only this one
    density += 1
    density /= glass + 1
    np.log10(density, out=density)
    np.negative(density, out=density)
    return np.maximum(density, 0, out=density)


def _find_stain(density: Plane, usable: Mask) -> Mask:
    """What has a stain's colour, strongly or next to what has it strongly. Overwrites ``density``."""
    if not usable.any():
        return np.zeros_like(usable)
    smoothed = ndimage.gaussian_filter(density, (SMOOTHING_CELLS, SMOOTHING_CELLS, 0), output=density)
    chroma = _largest(smoothed) - _smallest(smoothed)
    glass = chroma[usable & (smoothed.mean(axis=2) < GLASS_DENSITY)]
    noise = float(np.percentile(glass, 90)) if glass.size else 0.0
    low = float(np.clip(2.5 * noise, CHROMA_LOW, CHROMA_HIGH))
    high = float(np.clip(_otsu(chroma[usable]), CHROMA_LOW, CHROMA_HIGH))
    strongest = _largest(smoothed)
    weak = usable & ((chroma > low) | ((strongest > DENSE) & (chroma > GREY_PART * strongest)))
    mask: Mask = ndimage.binary_propagation(usable & (chroma > max(low, high)), mask=weak)
    return mask


def _find_fluorescence(thumbnail: Pixels, scanned: Mask) -> Mask:
    """What is brighter than the noise of the background, joined over the distance between neighbouring nuclei."""
    light = ndimage.gaussian_filter(_largest(thumbnail).astype(np.float32), NUCLEI_CELLS)
    background = float(np.percentile(light[scanned], 2))
    lower = light[scanned & (light <= np.percentile(light[scanned], 20))]
    noise = 1.4826 * float(np.median(np.abs(lower - np.median(lower))))
    mask: Mask = light > background + max(3.0, 5 * noise)
    return mask


def _otsu(values: npt.NDArray[np.floating]) -> float:
    return float(threshold_otsu(values)) if values.min() < values.max() else 0.0  # type: ignore[no-untyped-call]


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
    grown: Mask = ndimage.binary_dilation(_fill_small_holes(kept), ndimage.generate_binary_structure(2, 1))
    return grown


def _fill_small_holes(mask: Mask, largest_cells: int = 256) -> Mask:
    labels, count = ndimage.label(~mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = largest_cells + 1
    filled: Mask = mask | (sizes <= largest_cells)[labels]
    return filled
