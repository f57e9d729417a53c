"""A slide as scanners at 40x write it, of any size, in bounded memory: tiles of texture, encoded once and repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wholeslide.bench.texture import SQUARE_PX, Disc, random_pattern, reduced
from wholeslide.geometry import Box, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import Pixels, slide_error
from wholeslide.slides.scale import SAME_SCALE
from wholeslide.slides.working import open_working_slide

L0_MPP, L1_MPP = 0.25, 1.0
WORKING_MPP = 2.0
"""Sizes are given at this scale, which is 5x."""
TILE_PX = 256
#: Levels, counted from level 1 on, which is the finest that holds the texture: a quarter of level 0, and a sixteenth.
_L1_PER_WORKING = round(WORKING_MPP / L1_MPP)
_L1_PER_LEVEL = (1, 4)
_L0_PER_L1 = round(L1_MPP / L0_MPP)
_PATTERNS = 48
#: Places of a slide that are looked at for each tile of texture that is taken from it.
_LOOKS = 8
_WHITE = 255

Encoder = Callable[[Pixels], bytes]


@dataclass(frozen=True)
class Format:
    """How tiles are compressed, and how a TIFF says so."""

    encode: Encoder
    tags: dict[str, Any]


def _jpeg_of_colour_differences(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, level=70, colorspace="RGB", outcolorspace="YCBCR", subsampling="420"))


def _jpeg_of_rgb(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, level=70, colorspace="RGB", outcolorspace="RGB"))


def _jpeg2000(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(pixels, level=38, codecformat="j2k", mct=True))


FORMATS = {
    "jpeg": Format(_jpeg_of_colour_differences, {"compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)}),
    "jpeg-rgb": Format(
        _jpeg_of_rgb, {"compression": "jpeg", "photometric": "rgb", "compressionargs": {"outcolorspace": "RGB"}}
    ),
    "jpeg2000": Format(_jpeg2000, {"compression": tifffile.COMPRESSION.APERIO_JP2000_RGB, "photometric": "rgb"}),
}
"""Quality 70 with colour at half the resolution, as most scanners store it; with components left as they are; JPEG 2000."""


def texture_tiles(slide: Path | None, *, seed: int) -> list[Pixels]:
    """Distinct tiles of texture, (256, 256, 3): the most tissue of so many random places of a slide, or made up without one.

    A slide is read at 1 micron a pixel, the scale of level 1; one that is coarser or without scale as it is stored.

    Raises:
        SlideError: the slide cannot be read, has no tissue, or is smaller than a tile.
    """
    rng = np.random.default_rng(seed)
    if slide is None:
        return [random_pattern(rng, TILE_PX) for _ in range(_PATTERNS)]
    reader = open_slide(slide)
    l0_mpp = reader.l0_mpp
    reader.close()
    is_finer = l0_mpp is not None and max(l0_mpp.x, l0_mpp.y) <= L1_MPP * (1 + SAME_SCALE)
    working = open_working_slide(slide, SlideConfig(mpp=L1_MPP if is_finer else "native"))
    try:
        space = working.whole_size
        if min(space.width, space.height) < TILE_PX:
            raise slide_error(
                f"only {space} pixels", slide, f"take the texture from a slide of at least {TILE_PX} a side"
            )
        lefts = rng.integers(space.width - TILE_PX + 1, size=_LOOKS * _PATTERNS)
        tops = rng.integers(space.height - TILE_PX + 1, size=_LOOKS * _PATTERNS)
        boxes = [Box(int(left), int(top), TILE_PX, TILE_PX) for left, top in zip(lefts, tops, strict=True)]
        boxes.sort(key=lambda box: -float(working.mask.pixels(box).mean()))
        return [working.read_whole(box) for box in boxes[:_PATTERNS]]
    finally:
        working.close()


def write_pyramid(
    path: Path,
    size: Size,
    patterns: Sequence[Pixels],
    *,
    seed: int,
    tissue_fraction: float = 1.0,
    stored_as: str = "jpeg",
) -> None:
    """An Aperio SVS at 40x: levels at 1, 1/4 and 1/16 with tiles of 256 pixels, a disc of texture on white.

    Level 0 is there in size only, every place of it one and the same stored tile: at 5x it is never read.

    Args:
        path: ends in ``.svs``.
        size: of the slide at 5x, an eighth of level 0.
        patterns: tiles of level 1, from :func:`texture_tiles`.
        seed: decides which one lies where.
        tissue_fraction: the part of the slide that the disc covers; all of it at 1.
        stored_as: one of :data:`FORMATS`.
    """
    form, l1_size = FORMATS[stored_as], Size(size.width * _L1_PER_WORKING, size.height * _L1_PER_WORKING)
    l0_size = Size(l1_size.width * _L0_PER_L1, l1_size.height * _L0_PER_L1)
    plane = _Plane.drawn(l1_size, patterns, seed=seed, tissue_fraction=tissue_fraction)
    mean_rgb = np.mean([pattern.mean(axis=(0, 1)) for pattern in patterns], axis=0)
    filler = form.encode(np.broadcast_to(mean_rgb.astype(np.uint8), (TILE_PX, TILE_PX, 3)).copy())
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        _write_level(file, form, l0_size, (filler if place == 0 else b"" for place in range(_tile_count(l0_size))))
        for downsample in _L1_PER_LEVEL:
            level = Size(-(-l1_size.width // downsample), -(-l1_size.height // downsample))
            _write_level(file, form, level, plane.encoded(downsample, form.encode))
    _share_first_tile(path)


@dataclass(frozen=True)
class _Plane:
    """Level 1: which of the ``patterns`` lies at each place, and the disc beside which all is white."""

    disc: Disc
    patterns: Sequence[Pixels]
    chosen: npt.NDArray[np.int64]

    @classmethod
    def drawn(cls, l1_size: Size, patterns: Sequence[Pixels], *, seed: int, tissue_fraction: float) -> _Plane:
        shape = (-(-l1_size.height // TILE_PX), -(-l1_size.width // TILE_PX))
        chosen = np.random.default_rng(seed).integers(len(patterns), size=shape)
        return cls(Disc.covering(l1_size, tissue_fraction), patterns, chosen)

    def encoded(self, downsample: int, encode: Encoder) -> Iterator[bytes]:
        """The tiles of a level, row by row: each is made of ``downsample`` × ``downsample`` tiles of level 1."""

        @functools.cache
        def encoded_once(index: int) -> bytes:
            return encode(self.patterns[index])

        smaller = [reduced(pattern, downsample) for pattern in self.patterns]
        white = encode(np.full((TILE_PX, TILE_PX, 3), _WHITE, np.uint8))
        rows, columns = self.chosen.shape
        for top in range(0, rows, downsample):
            for left in range(0, columns, downsample):
                l1_box = Box(left * TILE_PX, top * TILE_PX, downsample * TILE_PX, downsample * TILE_PX)
                textured = self.disc.squares(l1_box)
                if not textured.any():
                    yield white
                elif downsample == 1 and textured.all():
                    yield encoded_once(int(self.chosen[top, left]))
                else:
                    yield encode(self._tile(top, left, downsample, smaller, textured))

    def _tile(
        self, top: int, left: int, downsample: int, smaller: Sequence[Pixels], textured: npt.NDArray[np.bool_]
    ) -> Pixels:
        tile = np.full((TILE_PX, TILE_PX, 3), _WHITE, np.uint8)
        side_px = TILE_PX // downsample
        for row, indices in enumerate(self.chosen[top : top + downsample, left : left + downsample]):
            for column, index in enumerate(indices):
                tile[Box(column * side_px, row * side_px, side_px, side_px).rows_columns] = smaller[int(index)]
        repeats = SQUARE_PX // downsample
        tile[~textured.repeat(repeats, axis=0).repeat(repeats, axis=1)] = _WHITE
        return tile


def _tile_count(level: Size) -> int:
    return -(-level.width // TILE_PX) * -(-level.height // TILE_PX)


def _write_level(file: tifffile.TiffWriter, form: Format, level: Size, encoded: Iterator[bytes]) -> None:
    file.write(
        encoded,
        shape=(level.height, level.width, 3),
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        description=f"Aperio Image Library v12.0\n{level} ({TILE_PX}x{TILE_PX})|AppMag = 40|MPP = {L0_MPP}",
        metadata=None,
        software=False,
        **form.tags,
    )


def _share_first_tile(path: Path) -> None:
    """Let all places of level 0 name the one tile that it has."""
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages.first
        count = len(page.dataoffsets)
        page.tags["TileOffsets"].overwrite([page.dataoffsets[0]] * count)
        page.tags["TileByteCounts"].overwrite([page.databytecounts[0]] * count)
