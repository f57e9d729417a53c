"""Where a slide has tissue: a mask of square cells of working pixels, found without a parameter to tune.

Brightfield: tissue is what has the colour of a stain. Optical density over the glass, Otsu's threshold on its chroma
(Otsu 1979), bounded so that an image full of tissue or of glass is not split in two. Neutral grey (glass edges, dust,
shadows) has no chroma; pen ink is taken out by :mod:`wholeslide.slides.pen`. Dark slides (fluorescence): tissue is what
is brighter than the background's noise.

The data flow: a thumbnail gives the glass's level, with it strips of optical density, these the pen and then a plane of smoothed
chroma, and its thresholds a mask, which is tidied. Whole planes together take about twelve bytes a cell at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.filters import threshold_otsu

from wholeslide.geometry import Box, Size
from wholeslide.slides.density import OpticalDensity
from wholeslide.slides.pen import pen_mask
from wholeslide.slides.planes import Mask, Plane, large_components, planar, strips
from wholeslide.slides.readers import Pixels

DARK_LEVEL = 50
BRIGHT_LEVEL = 180
GLASS_DENSITY = 0.03
DENSE = 0.25
GREY_PART = 0.08
CHROMA_LOW = 0.02
CHROMA_HIGH = 0.06
SMALLEST_OBJECT_CELLS = 16
LARGEST_HOLE_CELLS = 256
NUCLEI_CELLS = 4.0
_OTSU_BINS = 256


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
        px_area = sum(float(rows[strip] @ (self.cells[strip] @ columns)) for strip in strips(self.cells.shape))
        return px_area / max(1, self.size.area)

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
        side = self.px_per_cell
        rows = np.arange(px_box.top, px_box.bottom) // side - px_box.top // side
        columns = np.arange(px_box.left, px_box.right) // side - px_box.left // side
        mask: Mask = self._cells_of(px_box)[rows][:, columns]
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
    dark, bright = np.zeros(2, np.int64)
    for rows in strips(scanned.shape):
        levels_chw = planar(thumbnail[rows])
        dark += np.count_nonzero(scanned[rows] & (levels_chw.max(axis=0) < DARK_LEVEL))
        bright += np.count_nonzero(scanned[rows] & (levels_chw.min(axis=0) > BRIGHT_LEVEL))
    total = np.count_nonzero(scanned)
    return bool(dark / total > 0.3 and bright / total < 0.02)


def find_tissue(thumbnail: Pixels, scanned: Mask) -> Mask:
    """Tissue of a thumbnail of about 8 microns a pixel.

    Args:
        thumbnail: uint8 of shape (height, width, 3).
        scanned: bool of shape (height, width), false where the scanner took no picture.

    Returns:
        bool of shape (height, width).
    """
    if not scanned.any():
        return np.zeros_like(scanned)
    if is_dark(thumbnail, scanned):
        return _tidy(_find_fluorescence(thumbnail, scanned)) & scanned
    density = OpticalDensity(thumbnail, scanned)
    usable = ~pen_mask(density)
    usable &= scanned
    return _tidy(_find_stain(density, usable)) & usable


def _find_stain(density: OpticalDensity, usable: Mask) -> Mask:
    """What has a stain's colour, strongly or next to what has it strongly."""
    if not usable.any():
        return np.zeros_like(usable)
    chroma, dense, glass = np.empty(usable.shape, np.float32), np.empty_like(usable), np.empty_like(usable)
    for rows in strips(usable.shape):
        density_chw = density.smoothed(rows)
        strongest, red, green, blue = density_chw.max(axis=0), *density_chw
        np.subtract(strongest, density_chw.min(axis=0), out=chroma[rows])
        dense[rows] = (strongest > DENSE) & (chroma[rows] > GREY_PART * strongest)
        glass[rows] = usable[rows] & ((red + (green + blue)) / np.float32(3) < GLASS_DENSITY)
    noise = float(np.percentile(chroma[glass], 90, overwrite_input=True)) if glass.any() else 0.0
    low = float(np.clip(2.5 * noise, CHROMA_LOW, CHROMA_HIGH))
    high = float(np.clip(_otsu(chroma, usable), CHROMA_LOW, CHROMA_HIGH))
    weak, strong = dense, glass  # in their place
    for rows in strips(usable.shape):
        weak[rows] = usable[rows] & ((chroma[rows] > low) | dense[rows])
        strong[rows] = usable[rows] & (chroma[rows] > max(low, high))
    del chroma
    return large_components(weak, 1, counted=strong)


def _find_fluorescence(thumbnail: Pixels, scanned: Mask) -> Mask:
    """What is brighter than the noise of the background, joined over the distance between neighbouring nuclei."""
    light = np.empty(scanned.shape, np.float32)
    for rows in strips(scanned.shape):
        light[rows] = planar(thumbnail[rows]).max(axis=0)
    ndimage.gaussian_filter(light, NUCLEI_CELLS, output=light)
    values = light[scanned]
    background = float(np.percentile(values, 2, overwrite_input=True))
    lower_count = np.count_nonzero(values <= np.percentile(values, 20, overwrite_input=True))
    values.partition(lower_count - 1)
    deviation = values[:lower_count]
    deviation -= np.median(deviation, overwrite_input=True)
    noise = 1.4826 * float(np.median(np.abs(deviation, out=deviation), overwrite_input=True))
    mask: Mask = light > background + max(3.0, 5 * noise)
    return mask


def _otsu(plane: Plane, usable: Mask) -> float:
    """Otsu's threshold of the cells that are usable, of which there is at least one; 0 where all are the same."""
    ends = [(part.min(), part.max()) for rows in strips(plane.shape) if (part := plane[rows][usable[rows]]).size]
    lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
    if lowest == highest:
        return 0.0
    counts = np.zeros(_OTSU_BINS, np.int64)
    for rows in strips(plane.shape):
        found, edges = np.histogram(plane[rows][usable[rows]], _OTSU_BINS, (lowest, highest))
        counts += found
    return float(threshold_otsu(hist=(counts, (edges[:-1] + edges[1:]) / 2)))  # type: ignore[no-untyped-call]


def _tidy(mask: Mask) -> Mask:
    """Close gaps, drop specks, fill holes, and keep a margin of a cell."""
    if not mask.any():
        return mask
    cross = ndimage.generate_binary_structure(2, 1)
    padded = np.pad(mask, 4, mode="edge")
    closed: Mask = ndimage.binary_closing(padded, ndimage.iterate_structure(cross, 2))[4:-4, 4:-4]
    del padded
    kept = large_components(closed, SMALLEST_OBJECT_CELLS, diagonally=True)
    filled = ~large_components(~kept, LARGEST_HOLE_CELLS + 1)
    grown: Mask = ndimage.binary_dilation(filled, cross)
    return grown
