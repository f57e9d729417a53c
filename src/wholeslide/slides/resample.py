"""Area averaging with exact fractional coverage: the one way in which stored pixels become working pixels.

Working pixel ``i`` of an axis covers the stored interval ``[origin + i·ratio, origin + (i+1)·ratio)`` and is the mean
of the stored pixels, each weighted by the part of it that lies inside. The weights come from ``i`` alone and are summed
elementwise in a fixed order, so a pixel does not depend on the box that it is computed with, to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box

EDGE_TOLERANCE = 1e-6
CACHE_BYTES = 2**19


@dataclass(frozen=True)
class AxisMap:
    """How one axis of the working frame lies on the same axis of a level.

    Attributes:
        origin: the level pixel at which working pixel 0 starts.
        ratio: level pixels per working pixel, at least 1.
    """

    origin: int
    ratio: float

    @property
    def is_whole(self) -> bool:
        return self.ratio == int(self.ratio)

    def level_span(self, px_start: int, px_stop: int) -> tuple[int, int]:
        """The level pixels ``first … last-1`` that working pixels ``px_start … px_stop-1`` touch."""
        if self.is_whole:
            return self.origin + px_start * int(self.ratio), self.origin + px_stop * int(self.ratio)
        first = math.floor(px_start * self.ratio + EDGE_TOLERANCE)
        last = math.ceil(px_stop * self.ratio - EDGE_TOLERANCE)
        return self.origin + first, self.origin + last

    def taps(self, px_start: int, px_stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Level pixels and their weights, both of shape (px_stop - px_start, taps); the weights of a row sum to one."""
        px = np.arange(px_start, px_stop, dtype=np.float64)
        level_start, level_stop = px * self.ratio, (px + 1) * self.ratio
        first = np.floor(level_start + EDGE_TOLERANCE)
        count = math.ceil(self.ratio) + 1
        level_px = first[:, None] + np.arange(count)
        covered = np.minimum(level_px + 1, level_stop[:, None]) - np.maximum(level_px, level_start[:, None])
        covered = np.where(covered > EDGE_TOLERANCE, covered, 0.0)
        weights = covered / covered.sum(axis=1, keepdims=True)
        return level_px.astype(np.int64) + self.origin, weights.astype(np.float32)


@dataclass(frozen=True)
class Resampling:
    """How the working frame lies on a level: one :class:`AxisMap` an axis."""

    x: AxisMap
    y: AxisMap

    @property
    def is_copy(self) -> bool:
        return self.x.ratio == 1 and self.y.ratio == 1

    def level_box(self, px_box: Box) -> Box:
        """The level pixels that a box of working pixels touches."""
        left, right = self.x.level_span(px_box.left, px_box.right)
        top, bottom = self.y.level_span(px_box.top, px_box.bottom)
        return Box.from_edges(left, top, right, bottom)

    def average(self, level_hwc: npt.NDArray[np.uint8], px_box: Box) -> npt.NDArray[np.uint8]:
        """Working pixels of a box from the level's pixels of :meth:`level_box`.

        Args:
            level_hwc: uint8 of shape (level height, level width, 3).
            px_box: the working pixels wanted.

        Returns:
            uint8 of shape (height, width, 3), rounded to nearest.
        """
        if self.is_copy:
            return level_hwc
        box = self.level_box(px_box)
        assert level_hwc.shape[:2] == (box.height, box.width), (level_hwc.shape, box)
        channels = level_hwc.shape[2]
        rows = _average_rows(level_hwc.reshape(box.height, -1), self.y, px_box.top, px_box.bottom)
        turned = np.ascontiguousarray(rows.reshape(px_box.height, box.width, channels).transpose(1, 0, 2))
        columns = _average_rows(turned.reshape(box.width, -1), self.x, px_box.left, px_box.right)
        total = columns.reshape(px_box.width, px_box.height, channels).transpose(1, 0, 2)
        scale = np.float32(1.0 / (self._summed(self.x) * self._summed(self.y)))
        mean = np.multiply(total, scale, dtype=np.float32, order="C")
        mean += np.float32(0.5)
        rounded: npt.NDArray[np.uint8] = mean.astype(np.uint8)
        return rounded

    @staticmethod
    def _summed(axis: AxisMap) -> int:
        """By how much :func:`_average_rows` has left the axis too large: whole ratios are summed, not averaged."""
        return int(axis.ratio) if axis.is_whole else 1


def _average_rows(rows: npt.NDArray[Any], axis: AxisMap, px_start: int, px_stop: int) -> npt.NDArray[Any]:
    """Sum (whole ratio, exact in integers) or average (any other) the rows of a (level rows, n) array."""
    if axis.is_whole:
        return _sum_rows(rows, int(axis.ratio))
    level_px, weights = axis.taps(px_start, px_stop)
    first, last = axis.level_span(px_start, px_stop)
    level_px = np.minimum(level_px, last - 1) - first
    total = np.empty((px_stop - px_start, rows.shape[1]), np.float32)
    block = max(1, CACHE_BYTES // max(1, 4 * rows.shape[1]))
    for start in range(0, len(total), block):
        part = slice(start, start + block)
        _weigh_rows(rows, level_px[part], weights[part], total[part])
    return total


def _weigh_rows(
    rows: npt.NDArray[Any],
    level_px: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """``out[i] = Σ_t weights[i, t] · rows[level_px[i, t]]``, the taps in order."""
    np.multiply(rows[level_px[:, 0]], weights[:, :1], out=out)
    scratch = np.empty_like(out)
    for tap in range(1, level_px.shape[1]):
        if weights[:, tap].any():
            np.multiply(rows[level_px[:, tap]], weights[:, tap : tap + 1], out=scratch)
            out += scratch


def _sum_rows(rows: npt.NDArray[Any], ratio: int) -> npt.NDArray[Any]:
    if ratio == 1:
        return rows
    grouped = rows.reshape(-1, ratio, rows.shape[1])
    wide: type[np.generic] = np.float32
    if rows.dtype == np.uint8 and ratio <= 257:
        wide = np.uint16
    elif rows.dtype != np.float32:
        wide = np.uint32
    total: npt.NDArray[Any] = grouped[:, 0].astype(wide)
    for tap in range(1, ratio):
        total += grouped[:, tap]
    return total
