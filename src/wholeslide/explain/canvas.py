"""The whole of level 0 on a small canvas: the slide's pixels and its tissue, at the same places as any map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholeslide.explain.maps import HeatMap
from wholeslide.geometry import Box, Size
from wholeslide.slides.readers import Pixels
from wholeslide.slides.scale import sample_at
from wholeslide.slides.working import WorkingSlide, sample
from wholeslide.streaming.heat import Map

_CHUNK_LEVEL_PX = 2048
"""Side of what is read of a level at once."""

_ROWS_AT_ONCE = 256
"""Of a map's cells: counting those of the mask takes several times the map's own memory."""

_ROUNDING = 1e-6
"""Of a mask's cell: edges that are meant to coincide."""

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Canvas:
    """Square pixels that cover level 0 from its upper left corner, ``l0_px`` of it each."""

    size: Size
    l0_px: int

    @classmethod
    def covering(cls, l0_size: Size, side_px: int) -> Canvas:
        """With a longer side of at most ``side_px``."""
        l0_px = -(-max(l0_size.width, l0_size.height) // side_px)
        return cls(Size(-(-l0_size.width // l0_px), -(-l0_size.height // l0_px)), l0_px)

    @property
    def everything(self) -> Box:
        """All of its pixels."""
        return Box.covering(self.size)

    def centres(self, box: Box) -> tuple[Positions, Positions]:
        """Level-0 x of a box's columns, (w,), and y of its rows, (h,)."""
        columns = np.arange(box.left, box.right, dtype=np.float64)
        rows = np.arange(box.top, box.bottom, dtype=np.float64)
        return (columns + 0.5) * self.l0_px, (rows + 0.5) * self.l0_px

    def pixels(self, slide: WorkingSlide) -> Pixels:
        """The slide, (h, w, 3); what was not scanned is background. To half a pixel where scanning began within level 0.

        Raises:
            SlideError: the file cannot be decoded.
        """
        canvas = np.full((self.size.height, self.size.width, 3), slide.background_rgb, np.uint8)
        sampling = sample_at(slide.reader, self.l0_px, self.l0_px, snap=False)
        bounds = slide.reader.l0_bounds
        left, top = round(bounds.left / self.l0_px), round(bounds.top / self.l0_px)
        scanned = Box.covering(sampling.size)
        step_x = max(1, int(_CHUNK_LEVEL_PX / sampling.resampling.x.ratio))
        step_y = max(1, int(_CHUNK_LEVEL_PX / sampling.resampling.y.ratio))
        for row in range(0, scanned.height, step_y):
            for column in range(0, scanned.width, step_x):
                chunk = Box(column, row, step_x, step_y).intersection(scanned)
                place = chunk.shifted(left, top).intersection(self.everything)
                shown = sample(slide.reader, sampling, chunk, slide.background_rgb)
                canvas[place.rows_columns] = shown[: place.height, : place.width]
        return canvas

    def tissue(self, slide: WorkingSlide, box: Box) -> npt.NDArray[np.bool_]:
        """Where a box shows tissue, (h, w)."""
        mask, whole = slide.mask, slide.whole_size
        l0_x_w, l0_y_h = self.centres(box)
        origin = slide.l0_from_whole(np.zeros((1, 2)))[0]
        columns = np.floor((l0_x_w - origin[0]) / slide.sampling.downsample_x).astype(np.int64)
        rows = np.floor((l0_y_h - origin[1]) / slide.sampling.downsample_y).astype(np.int64)
        inside = ((rows >= 0) & (rows < whole.height))[:, None] & (columns >= 0) & (columns < whole.width)
        side = mask.px_per_cell
        cell_rows = np.clip(rows, 0, whole.height - 1) // side
        cell_columns = np.clip(columns, 0, whole.width - 1) // side
        tissue: npt.NDArray[np.bool_] = inside & mask.cells[cell_rows[:, None], cell_columns]
        return tissue


def on_tissue(heat: HeatMap, slide: WorkingSlide) -> Map:
    """A map's values in cells that touch tissue, NaN in the others."""
    height, width = heat.values_hw.shape
    counted = np.pad(np.cumsum(np.cumsum(slide.mask.cells, axis=0, dtype=np.int64), axis=1), ((1, 0), (1, 0)))
    origin = slide.l0_from_whole(np.zeros((1, 2)))[0]
    downsample = (slide.sampling.downsample_x, slide.sampling.downsample_y)

    def edges(axis: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The first cell of the mask that each of the map's rows or columns touches, and the one behind the last."""
        l0_edges = heat.l0_origin[axis] + np.arange(count + 1) * heat.l0_cell[axis]
        mask_edges = (l0_edges - origin[axis]) / downsample[axis] / slide.mask.px_per_cell
        most = counted.shape[1 - axis] - 1
        first, behind = np.floor(mask_edges[:-1] + _ROUNDING), np.ceil(mask_edges[1:] - _ROUNDING)
        return np.clip(first, 0, most).astype(np.int64), np.clip(behind, 0, most).astype(np.int64)

    (left, right), (top, bottom) = edges(0, width), edges(1, height)
    shown = np.empty_like(heat.values_hw)
    for start in range(0, height, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        touched = (
            counted[np.ix_(bottom[rows], right)]
            - counted[np.ix_(top[rows], right)]
            - counted[np.ix_(bottom[rows], left)]
            + counted[np.ix_(top[rows], left)]
        )
        shown[rows] = np.where(touched > 0, heat.values_hw[rows], np.float32(np.nan))
    return shown
