"""Which pixels of a view are all of one colour, and which cells of its features are therefore all one vector.

Where everything that a cell sees is background, the cell is a constant of the slide: it needs to be computed once. A cell that
sees past the image's edge feels the network's zero padding and is not one of them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.model.locality import AxisLocality, Locality

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8 | np.float32]
"""As they are stored, or in [0, 1]."""
_Edges = npt.NDArray[np.int64]

#: Side of the blocks in which pixels are told apart.
BLOCK_PX = 32


class PixelSource(Protocol):
    """What a slide gives to the network: a size in pixels, and boxes of pixels, (h, w, 3), all uint8 or all float32 in [0, 1]."""

    @property
    def size(self) -> Size: ...

    @property
    def background(self) -> Pixels | None:
        """The colour that large parts may have, as :meth:`read` gives it, (3,); nothing where there is none."""
        ...

    def read(self, px_box: Box) -> Pixels:
        """May be called on several threads at once."""
        ...

    def is_background(self, px_box: Box) -> bool:
        """Whether all pixels of a box are known to have that colour without reading them."""
        ...


class VaryingPixels:
    """The blocks of a view that hold a pixel of another colour than the background, as they come to be known.

    Args:
        size: of the view in pixels.
        everywhere: whether all blocks are taken to vary, whatever is noted.
    """

    def __init__(self, size: Size, *, everywhere: bool = False) -> None:
        self.size = size
        shape = (-(-size.height // BLOCK_PX), -(-size.width // BLOCK_PX))
        self._blocks: Mask = np.full(shape, everywhere)

    def note(self, px_box: Box, pixels_hwc: Pixels, background: Pixels) -> None:
        """Learn from the pixels of a box: one of each block tells most, and only where that is background are all looked at."""
        rows, columns = _block_starts(px_box.top, px_box.bottom), _block_starts(px_box.left, px_box.right)
        varies: Mask = (pixels_hwc[rows[:, None], columns] != background).any(axis=2)
        row_stops, column_stops = np.append(rows[1:], px_box.height), np.append(columns[1:], px_box.width)
        for row, column in np.argwhere(~varies):
            block_hwc = pixels_hwc[rows[row] : row_stops[row], columns[column] : column_stops[column]]
            varies[row, column] = bool((block_hwc != background).any())
        top, left = px_box.top // BLOCK_PX, px_box.left // BLOCK_PX
        self._blocks[top : top + len(rows), left : left + len(columns)] |= varies

    @property
    def anywhere_constant(self) -> bool:
        """Whether any block is all background."""
        return not self._blocks.all()

    def seen_by(self, locality: Locality, cells: Size, *, side: int, within: Box | None = None) -> Mask:
        """The squares of ``side`` × ``side`` cells of which a cell sees a varying block, or past the image's edge.

        Args:
            locality: from pixels to the cells.
            cells: how many cells there are.
            side: of a square; the last squares may be cut by the border.
            within: cells, aligned to ``side``, whose squares are asked for; all by default.

        Returns:
            A row of squares for each row of the mask.
        """
        box = Box.covering(cells) if within is None else within
        left, right = _squares_reach(locality.x, box.left, box.right, side)
        top, bottom = _squares_reach(locality.y, box.top, box.bottom, side)
        leaves_x = (left < 0) | (right > self.size.width)
        leaves_y = (top < 0) | (bottom > self.size.height)
        x0, x1 = _block_range(left, right, self._blocks.shape[1])
        y0, y1 = _block_range(top, bottom, self._blocks.shape[0])
        sums = _sums_before(self._blocks[y0[0] : y1[-1], x0[0] : x1[-1]])
        x0, x1, y0, y1 = x0 - x0[0], x1 - x0[0], y0 - y0[0], y1 - y0[0]
        lower, upper = sums[y1], sums[y0]
        varying: Mask = (lower[:, x1] - lower[:, x0] - upper[:, x1] + upper[:, x0]) > 0
        return varying | leaves_y[:, None] | leaves_x[None, :]


def _sums_before(blocks: Mask) -> npt.NDArray[np.int64]:
    """How many varying blocks lie above and left of each corner."""
    rows, columns = blocks.shape
    sums = np.zeros((rows + 1, columns + 1), np.int64)
    np.cumsum(np.cumsum(blocks, axis=0, dtype=np.int64), axis=1, out=sums[1:, 1:])
    return sums


def _block_starts(start: int, stop: int) -> _Edges:
    """Where in a run of pixels each block begins that it touches."""
    first = (start // BLOCK_PX + 1) * BLOCK_PX
    return np.concatenate([[0], np.arange(first, stop, BLOCK_PX) - start]).astype(np.int64)


def _squares_reach(axis: AxisLocality, start: int, stop: int, side: int) -> tuple[_Edges, _Edges]:
    """The pixels that each square along an axis sees, first and one past the last."""
    first = np.arange(start, stop, side)
    last = np.minimum(first + side, stop) - 1
    return first * axis.stride - axis.before, last * axis.stride + axis.after + 1


def _block_range(starts: _Edges, stops: _Edges, blocks: int) -> tuple[_Edges, _Edges]:
    return np.clip(starts // BLOCK_PX, 0, blocks), np.clip(-(-stops // BLOCK_PX), 0, blocks)
