"""Where the compressed tiles of a level lie in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.slides.codecs import DECODING_ERRORS, Codec
from wholeslide.slides.readers import Pixels, unreadable
from wholeslide.slides.resample import AxisMap, Resampling

#: By how much sides can be reduced while a tile is decoded.
REDUCTIONS = (8, 4, 2, 1)


@dataclass(frozen=True)
class StoredTiles:
    """The tiles of one level, row by row.

    Attributes:
        file: where they lie.
        size: of the level, in pixels.
        tile: of every tile; the last ones of rows and columns reach over the level.
        codec: how they are stored.
        offsets: of each tile in the file, int64 (rows · columns).
        lengths: in bytes, likewise.
    """

    file: Path
    size: Size
    tile: Size
    codec: Codec
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    _handles: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _opening: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    @property
    def columns(self) -> int:
        return -(-self.size.width // self.tile.width)

    @property
    def rows(self) -> int:
        return -(-self.size.height // self.tile.height)

    @property
    def are_complete(self) -> bool:
        """Whether there is a tile for each place."""
        count = self.rows * self.columns
        return len(self.offsets) == len(self.lengths) == count > 0 and bool((self.lengths > 0).all())

    def divides(self, reduction: int) -> bool:
        """Whether tiles are whole numbers of pixels at 1/``reduction`` of their sides."""
        return self.tile.width % reduction == 0 and self.tile.height % reduction == 0

    def level_box(self, index: int) -> Box:
        """Of a tile, reaching over the level where the tile does."""
        row, column = divmod(index, self.columns)
        return Box(column * self.tile.width, row * self.tile.height, self.tile.width, self.tile.height)

    def decode(self, index: int, reduction: int) -> Pixels:
        """A tile at 1/``reduction`` of its sides: uint8 of shape (height, width, 3), cut at the level's edges.

        What lies beyond the level's edge is not averaged into what lies inside.

        Raises:
            SlideError: the file cannot be read there, or the tile is damaged.
        """
        inside = self.level_box(index).intersection(Box.covering(self.size)).size
        data = self._read(index)
        block = self.codec.block_px
        try:
            if reduction == 1 or inside == self.tile or (inside.width % block == 0 and inside.height % block == 0):
                pixels = self.codec.decode(data, self.tile, reduction)
            else:
                pixels = mean_of_blocks(
                    self.codec.decode(data, self.tile, 1)[: inside.height, : inside.width], reduction
                )
        except DECODING_ERRORS as error:
            raise unreadable(self.file, f"tile {index} of the level of {self.size} pixels: {error}") from error
        return pixels[: -(-inside.height // reduction), : -(-inside.width // reduction)]

    def close(self) -> None:
        """Let the file go; the next tile opens it again."""
        with self._opening:
            while self._handles:
                os.close(self._handles.pop())

    def _handle(self) -> int:
        with self._opening:
            if not self._handles:
                self._handles.append(os.open(self.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            return self._handles[0]

    def _read(self, index: int) -> bytes:
        length = int(self.lengths[index])
        try:
            data = os.pread(self._handle(), length, int(self.offsets[index]))
        except OSError as error:
            raise unreadable(self.file, error) from error
        if len(data) < length:
            raise unreadable(self.file, f"tile {index} of the level of {self.size} pixels ends behind the file's end")
        return data


def mean_of_blocks(pixels: Pixels, reduction: int) -> Pixels:
    """Of each ``reduction`` x ``reduction`` pixels; the last row and column are repeated where they do not divide."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % reduction), (0, -width % reduction), (0, 0)), mode="edge")
    axis = AxisMap(0, reduction)
    return Resampling(axis, axis).average(padded, Box(0, 0, padded.shape[1] // reduction, padded.shape[0] // reduction))
