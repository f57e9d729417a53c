"""Planes of cells, of which a large slide has tens of millions, worked on in strips of rows.

What is needed for a moment only, such as an optical density or an index of 64 bits, is then there for one strip at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.float32]

STRIP_CELLS = 1 << 18
"""Of a strip: few enough to stay in a processor's cache."""


def strips(shape: tuple[int, ...], least_cells: int = 0) -> Iterator[slice]:
    """The rows of a plane, or an image, of a shape (rows, columns, …) in slices, from the top.

    Args:
        shape: of the plane.
        least_cells: a strip, but for the last one, has about so many cells, or more.
    """
    rows, columns = shape[:2]
    step = max(1, max(STRIP_CELLS, least_cells) // max(1, columns))
    for top in range(0, rows, step):
        yield slice(top, min(rows, top + step))


def planar(image_hwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The channels of an image as planes of their own, (3, height, width): numpy is slow along an axis as short as three."""
    return np.ascontiguousarray(np.moveaxis(image_hwc, 2, 0))


def large_components(mask: Mask, least_cells: int, *, diagonally: bool = False, counted: Mask | None = None) -> Mask:
    """The connected components of a mask that have at least so many cells.

    Args:
        mask: bool of shape (rows, columns).
        least_cells: of a component.
        diagonally: whether cells that touch at a corner are connected.
        counted: the cells that count, of the same shape; left out: all.

    Returns:
        bool of the same shape.
    """
    counted = mask if counted is None else counted
    labels, count = ndimage.label(mask, ndimage.generate_binary_structure(2, 2 if diagonally else 1))
    cells = np.zeros(count + 1, np.int64)
    for rows in strips(mask.shape, least_cells=count):
        cells += np.bincount(labels[rows][counted[rows]], minlength=count + 1)
    kept = cells >= least_cells
    kept[0] = False  # what is in none
    large = np.empty_like(mask)
    for rows in strips(mask.shape):
        np.take(kept, labels[rows], out=large[rows], mode="clip")
    return large
