"""A slide as tiles of one size at resolutions that halve, as Deep Zoom has them; and any of them from the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wholeslide.explain.ome import halved
from wholeslide.geometry import Box, Size
from wholeslide.slides.readers import WHITE, Pixels, SlideReader
from wholeslide.slides.scale import sample_at
from wholeslide.slides.working import sample

TILE_PX = 256

_MOST_STORED_PX = 2048
"""Side of what is decoded for one tile; coarser tiles are made of finer ones."""


@dataclass(frozen=True)
class Tile:
    """One tile: the higher the level, the finer it is; columns and rows count from the upper left."""

    level: int
    column: int
    row: int


@dataclass(frozen=True)
class TilePyramid:
    """The tiles of a slide of ``l0_size`` level-0 pixels."""

    l0_size: Size

    @property
    def finest(self) -> int:
        """The level of level-0 pixels; one pixel would be the whole slide at level 0."""
        return math.ceil(math.log2(max(self.l0_size.width, self.l0_size.height)))

    @property
    def coarsest(self) -> int:
        """The finest level that is a single tile."""
        return max(0, min(self.finest, int(math.log2(TILE_PX))))

    def l0_px(self, level: int) -> int:
        """Level-0 pixels along a side of one pixel."""
        return 1 << (self.finest - level)

    def box(self, tile: Tile) -> Box | None:
        """The tile in pixels of its level; ``None`` where the slide has no such tile."""
        if not self.coarsest <= tile.level <= self.finest:
            return None
        l0_px = self.l0_px(tile.level)
        size = Size(-(-self.l0_size.width // l0_px), -(-self.l0_size.height // l0_px))
        if tile.column * TILE_PX >= size.width or tile.row * TILE_PX >= size.height:
            return None
        return Box(tile.column * TILE_PX, tile.row * TILE_PX, TILE_PX, TILE_PX).intersection(Box.covering(size))


def read_tile(reader: SlideReader, tile: Tile, finer: Callable[[Tile], Pixels]) -> Pixels:
    """A tile's pixels, uint8 of shape (height, width, 3), smaller at the slide's right and lower border.

    Args:
        reader: of the slide, which has the tile.
        tile: which one.
        finer: gives the tiles of the next finer level, where the file has no level near this one.

    Raises:
        SlideError: the file cannot be decoded.
    """
    pyramid = TilePyramid(reader.l0_size)
    box = pyramid.box(tile)
    assert box is not None, tile
    l0_px = pyramid.l0_px(tile.level)
    sampling = sample_at(reader, l0_px, l0_px, snap=False, l0_bounds=Box.covering(reader.l0_size))
    ratio = max(sampling.resampling.x.ratio, sampling.resampling.y.ratio)
    if ratio * TILE_PX <= _MOST_STORED_PX or tile.level == pyramid.finest:
        return sample(reader, sampling, box, WHITE)
    quarters = np.full((2 * box.height, 2 * box.width, 3), WHITE, np.uint8)
    for row in (0, 1):
        for column in (0, 1):
            quarter = Tile(tile.level + 1, 2 * tile.column + column, 2 * tile.row + row)
            if pyramid.box(quarter) is not None:
                pixels = finer(quarter)
                top, left = row * TILE_PX, column * TILE_PX
                quarters[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return halved(quarters)
