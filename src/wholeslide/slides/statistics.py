"""Mean and standard deviation of the training tissue's colours, with which every method normalises its input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wholeslide.draws import Draws
from wholeslide.errors import SlideError
from wholeslide.geometry import Box
from wholeslide.slides.augment import GREY_WEIGHTS
from wholeslide.slides.working import WorkingSlide

TILE_PX = 256


@dataclass(frozen=True)
class PixelStatistics:
    """Of tissue pixels, in [0, 1].

    Attributes:
        mean: of red, green and blue.
        std: the same three.
        mean_grey: mean luma, with which contrast jitter blends.
        pixels: how many were counted.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mean_grey: float
    pixels: int


def tissue_statistics(slides: Iterable[WorkingSlide], *, seed: int, max_pixels: int) -> PixelStatistics:
    """Colours of the tissue of some slides.

    From each slide, tiles of a fixed grid that hold tissue are drawn without replacement until they cover
    ``max_pixels``; every slide counts by the tissue pixels that were read from it. Sums are of integers, so neither the
    order of slides nor the machine changes the result.

    Args:
        slides: read one after the other and not kept, so a generator may open and close them.
        seed: of the draw of tiles.
        max_pixels: bound on the pixels that are read **from one slide**.

    Raises:
        SlideError: a slide cannot be decoded, or there is no tissue pixel at all.
    """
    count = 0
    total = np.zeros(3, np.int64)
    squares = np.zeros(3, np.int64)
    for slide in slides:
        for tile in _draw_tiles(slide, seed, max_pixels):
            tissue = slide.read(tile)[slide.mask.pixels(tile.shifted(slide.whole_box.left, slide.whole_box.top))]
            count += len(tissue)
            total += tissue.sum(axis=0, dtype=np.int64)
            squares += np.square(tissue, dtype=np.int64).sum(axis=0)
    if count == 0:
        raise SlideError.single("no tissue to take colours from", where="training split", remedy="add slides")
    mean = total / (count * 255.0)
    variance = np.maximum(squares / (count * 255.0**2) - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 1 / 255)
    return PixelStatistics(_triple(mean), _triple(std), float(mean @ np.asarray(GREY_WEIGHTS)), count)


def _draw_tiles(slide: WorkingSlide, seed: int, max_pixels: int) -> list[Box]:
    everything = Box.covering(slide.size)
    tiles = [
        Box(left, top, TILE_PX, TILE_PX).intersection(everything)
        for top in range(0, slide.size.height, TILE_PX)
        for left in range(0, slide.size.width, TILE_PX)
    ]
    tiles = [tile for tile in tiles if slide.mask.touches(tile.shifted(slide.whole_box.left, slide.whole_box.top))]
    order = Draws(seed, 0, slide.key).rng("statistics").permutation(len(tiles))
    drawn: list[Box] = []
    pixels = 0
    for index in order:
        if drawn and pixels + tiles[index].size.area > max_pixels:
            break
        drawn.append(tiles[index])
        pixels += tiles[index].size.area
    return drawn


def _triple(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
