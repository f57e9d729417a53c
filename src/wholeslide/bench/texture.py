"""A slide on disk, of any size, written and read in bounded memory: a disc of random texture on white."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wholeslide.geometry import Box, Size

#: Side of the squares that are all texture or all white. JPEG compresses squares that divide it, each for itself where colour
#: is not subsampled, so that white stays white.
SQUARE_PX = 16
_TILE_PX = 512
_PATTERNS = 16
#: Reduced levels, as a scanner writes them: the tissue of a large slide is found without decoding all of it.
_DOWNSAMPLES = (1, 4, 16)
#: The mean colour of the texture, that of a stain; how much each of its three layers changes its light, and its colour.
_MEAN_RGB, _LIGHT, _COLOUR = (190, 120, 165), 20, 5
_WHITE = 255


@dataclass(frozen=True)
class Disc:
    """Where a slide of ``size`` pixels has texture: around its centre, in as many squares as the disc has their centres.

    ``radius_px`` may pass the slide's edges; what lies outside is cut off.
    """

    size: Size
    radius_px: float

    @classmethod
    def covering(cls, size: Size, fraction: float) -> Disc:
        """The disc that covers this fraction of the slide's area; all of it is covered exactly."""
        half_diagonal_px = 0.5 * (size.width**2 + size.height**2) ** 0.5
        if fraction == 1:
            return cls(size, half_diagonal_px + SQUARE_PX)
        below, above = 0.0, half_diagonal_px
        for _ in range(60):
            middle = (below + above) / 2
            if _clipped_area(size, middle) < fraction * size.area:
                below = middle
            else:
                above = middle
        return cls(size, above)

    def squares(self, px_box: Box) -> npt.NDArray[np.bool_]:
        """Whether each square of a box, aligned to the squares, is texture; one row for each row of squares."""
        x, y = (
            np.arange(start, stop, SQUARE_PX) + SQUARE_PX / 2 - middle
            for start, stop, middle in (
                (px_box.left, px_box.right, self.size.width / 2),
                (px_box.top, px_box.bottom, self.size.height / 2),
            )
        )
        inside: npt.NDArray[np.bool_] = x[None, :] ** 2 + y[:, None] ** 2 < self.radius_px**2
        return inside

    def pixels(self, px_box: Box) -> npt.NDArray[np.bool_]:
        """Whether each pixel of a box, aligned to the squares at its upper left, is texture."""
        squares = self.squares(px_box).repeat(SQUARE_PX, axis=0).repeat(SQUARE_PX, axis=1)
        return squares[: px_box.height, : px_box.width]


def write_texture(path: Path, size: Size, *, seed: int, tissue_fraction: float = 1.0) -> None:
    """A tiled JPEG TIFF with reduced levels: a disc of random blobs that covers ``tissue_fraction``, white beside it."""
    rng = np.random.default_rng(seed)
    patterns = [random_pattern(rng, _TILE_PX) for _ in range(_PATTERNS)]
    columns, rows = -(-size.width // _TILE_PX), -(-size.height // _TILE_PX)
    chosen = rng.integers(_PATTERNS, size=(rows, columns))
    disc = Disc.covering(size, tissue_fraction)
    with tifffile.TiffWriter(path, bigtiff=size.area > 2**30) as file:
        for downsample in _DOWNSAMPLES:
            level = Size(-(-size.width // downsample), -(-size.height // downsample))
            file.write(
                _tiles(disc, chosen, [reduced(pattern, downsample) for pattern in patterns], downsample),
                shape=(level.height, level.width, 3),
                dtype=np.uint8,
                tile=(_TILE_PX, _TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                subsampling=(1, 1),
                subfiletype=int(downsample > 1),
                metadata=None,
            )


def _tiles(
    disc: Disc, chosen: npt.NDArray[np.int64], patterns: list[npt.NDArray[np.uint8]], downsample: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """The tiles of a level, row by row: each is made of ``downsample`` × ``downsample`` tiles of level 0."""
    rows, columns = chosen.shape
    side_px = _TILE_PX // downsample
    for top in range(0, rows, downsample):
        for left in range(0, columns, downsample):
            tile = np.full((_TILE_PX, _TILE_PX, 3), _WHITE, np.uint8)
            for row in range(top, min(top + downsample, rows)):
                for column in range(left, min(left + downsample, columns)):
                    place = Box((column - left) * side_px, (row - top) * side_px, side_px, side_px)
                    l0_box = Box(column * _TILE_PX, row * _TILE_PX, _TILE_PX, _TILE_PX)
                    repeats = SQUARE_PX // downsample
                    textured = disc.squares(l0_box).repeat(repeats, axis=0).repeat(repeats, axis=1)
                    part = tile[place.rows_columns]
                    part[textured] = patterns[chosen[row, column]][textured]
            yield tile


def random_pattern(rng: np.random.Generator, side_px: int) -> npt.NDArray[np.uint8]:
    """Noise at three scales, (side, side, 3)."""
    pixels = np.full((side_px, side_px, 3), _MEAN_RGB, np.float64)
    for scale in (1, 4, 16):
        shape = (side_px // scale, side_px // scale)
        coarse = _LIGHT * rng.normal(size=(*shape, 1)) + _COLOUR * rng.normal(size=(*shape, 3))
        pixels += coarse.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.clip(pixels, 0, _WHITE).astype(np.uint8)


def reduced(pattern: npt.NDArray[np.uint8], downsample: int) -> npt.NDArray[np.uint8]:
    """The mean of each ``downsample`` × ``downsample`` pixels."""
    side = len(pattern) // downsample
    means: npt.NDArray[np.uint8] = (
        pattern.reshape(side, downsample, side, downsample, 3).mean(axis=(1, 3)).astype(np.uint8)
    )
    return means


def _clipped_area(size: Size, radius_px: float) -> float:
    """Of a disc around the centre of a slide and inside it, row of pixels by row."""
    from_middle = np.arange(size.height) + 0.5 - size.height / 2
    half_chords = np.sqrt(np.maximum(radius_px**2 - from_middle**2, 0))
    return float(2 * np.minimum(half_chords, size.width / 2).sum())
