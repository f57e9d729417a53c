"""Optical density of a thumbnail, made strip by strip wherever it is asked for.

There are 256 levels a channel, so that a table gives it as fast as a plane of it could be read, and no such plane, of 12 bytes
a cell, ever exists.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wholeslide.slides.planes import Mask, Plane, planar, strips
from wholeslide.slides.readers import Pixels

GLASS_LEVEL = 200
GLASS_TINT = 24
ASSUMED_GLASS = 245
SMOOTHING_CELLS = 0.7
SMOOTHING_REACH_CELLS = 3
_LEVELS = 256
_BRIGHT_LEVELS = _LEVELS - GLASS_LEVEL


class OpticalDensity:
    """-log10 of transmitted light relative to the glass, at least 0.

    Args:
        thumbnail: uint8 of shape (height, width, 3).
        scanned: bool of shape (height, width), true somewhere.

    Attributes:
        shape: height and width.
    """

    def __init__(self, thumbnail: Pixels, scanned: Mask) -> None:
        self._thumbnail = thumbnail
        self.shape = thumbnail.shape[:2]
        light = np.arange(_LEVELS, dtype=np.float32) + 1
        self._table = np.maximum(-np.log10(light / (glass_level(thumbnail, scanned)[:, None] + 1)), 0)

    def strip(self, rows: slice) -> Plane:
        """Of some rows: float32 of shape (3, rows, width)."""
        levels_chw = planar(self._thumbnail[rows])
        density_chw = np.empty(levels_chw.shape, np.float32)
        for table, levels, density in zip(self._table, levels_chw, density_chw, strict=True):
            np.take(table, levels, out=density, mode="clip")
        return density_chw

    def smoothed(self, rows: slice) -> Plane:
        """Of some rows, after a Gaussian filter of the whole plane: the same numbers, because all that it reaches is there."""
        top, bottom = max(0, rows.start - SMOOTHING_REACH_CELLS), min(self.shape[0], rows.stop + SMOOTHING_REACH_CELLS)
        density_chw = self.strip(slice(top, bottom))
        ndimage.gaussian_filter(
            density_chw, (0, SMOOTHING_CELLS, SMOOTHING_CELLS), output=density_chw, radius=SMOOTHING_REACH_CELLS
        )
        return density_chw[:, rows.start - top : rows.stop - top]


def glass_level(thumbnail: Pixels, scanned: Mask) -> Plane:
    """The glass's red, green and blue, float32 of shape (3,), as the median of the brighter half of what is bright and neutral.

    Where next to nothing is (an image full of tissue), the glass is assumed white.
    """
    # How many bright cells have so much light in all and this level of a channel, both above the least that is bright: any
    # median can be told from that.
    counts_clv = np.zeros((3, 3 * _BRIGHT_LEVELS, _BRIGHT_LEVELS), np.int64)
    for rows in strips(scanned.shape):
        levels_chw = planar(thumbnail[rows])
        smallest = levels_chw.min(axis=0)
        bright = scanned[rows] & (smallest >= GLASS_LEVEL) & (levels_chw.max(axis=0) - smallest <= GLASS_TINT)
        levels_cn = np.stack([levels[bright] for levels in levels_chw]) - np.uint8(GLASS_LEVEL)
        light = levels_cn.sum(axis=0, dtype=np.intp) * _BRIGHT_LEVELS
        for counts, levels in zip(counts_clv, levels_cn, strict=True):
            counts += np.bincount(light + levels, minlength=counts.size).reshape(counts.shape)
    by_light = counts_clv[0].sum(axis=1)
    if by_light.sum() < 0.01 * np.count_nonzero(scanned):
        return np.full(3, ASSUMED_GLASS, np.float32)
    brightest = np.arange(by_light.size) >= _median(by_light)
    return np.array([GLASS_LEVEL + _median(counts[brightest].sum(axis=0)) for counts in counts_clv], np.float32)


def _median(counts: npt.NDArray[np.int64]) -> float:
    """Of integers from 0, each of which is there so many times; of two that are in the middle, their mean."""
    up_to, total = np.cumsum(counts), int(counts.sum())
    middle = np.searchsorted(up_to, [(total - 1) // 2, total // 2], side="right")
    return float(middle.mean())
