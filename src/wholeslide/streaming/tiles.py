"""A stage's output dealt to tiles, and the input window that each tile needs.

The cells that a tile owns are a fixed partition, aligned to the grid of the stage's classifier. Its window reaches out by the
halo that the stage's locality asks for; where that passes the image's edge, the window ends there and the network's own zero
padding takes over. Shares are even, so that all windows that no edge cuts are equally long: every new shape costs the convolution
library a kernel that it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.model.locality import AxisLocality, Locality

#: Side of the squares of x_0 that are computed or not, in cells.
STEM_ALIGN = 8
#: What starting a tile costs, in cells that could be computed meanwhile.
_CELLS_OF_A_CALL = 1000


@dataclass(frozen=True)
class Tile:
    """One piece of a stage's work.

    ``cell_own`` are the cells of x_k that it owns, ``cell_window`` the cells of x_{k−1} that it reads, and ``offset`` is where
    its own cells lie in what the stage makes of the window.
    """

    cell_own: Box
    cell_window: Box
    offset: Box


@dataclass(frozen=True)
class _Span:
    own_start: int
    own_stop: int
    window_start: int
    window_stop: int


def partition(input_size: Size, locality: Locality, *, tile_cells: int, align: int = 1) -> list[Tile]:
    """Tiles that own every output cell exactly once, row by row.

    Args:
        input_size: cells of x_{k−1}.
        locality: of the stage.
        tile_cells: largest side of a tile in cells of x_k, a multiple of ``align``.
        align: own cells start at multiples of this, the kernel of the stage's classifier.
    """
    output_size = locality.output_size(input_size)
    columns = _spans(input_size.width, output_size.width, locality.x, tile_cells, align)
    rows = _spans(input_size.height, output_size.height, locality.y, tile_cells, align)
    return [_tile(column, row, locality) for row in rows for column in columns]


def cover(
    active: npt.NDArray[np.bool_],
    input_size: Size,
    locality: Locality,
    *,
    tile_cells: int,
    align: int,
    within: Box | None = None,
) -> list[Tile]:
    """Tiles that own every cell of the active squares once, and as little else as pays.

    Rows of squares are joined into bands, and the active ones of a band into runs, so that the cells of all windows are fewest.

    Args:
        active: squares of ``align`` × ``align`` output cells, a row of them for each row of the mask.
        input_size: cells of x_{k−1}.
        locality: of the stage.
        tile_cells: largest side of a tile in cells of x_k, a multiple of ``align``.
        align: side of a square.
        within: the output cells that the mask is of, aligned to the squares; all by default.
    """
    output = Box.covering(locality.output_size(input_size)) if within is None else within
    halo_x, halo_y = (axis.halo_before + axis.halo_after for axis in (locality.x, locality.y))
    gap, most = -(-halo_x // align), tile_cells // align
    tiles = []
    for top, bottom, runs in _bands(
        active, halo=(halo_x / align, halo_y / align), call=_CELLS_OF_A_CALL / align**2, gap=gap, most=most
    ):
        for left, right in (share for run in runs for share in _even_shares(*run, most)):
            squares = Box.from_edges(left * align, top * align, right * align, bottom * align)
            own = squares.shifted(output.left, output.top).intersection(output)
            tiles.append(_tile_of(own, input_size, locality))
    return tiles


def work_cells(tiles: list[Tile], locality: Locality) -> float:
    """What tiles cost together, in cells of x_k: their windows, and a little for each."""
    return sum(
        tile.cell_window.size.area / (locality.x.stride * locality.y.stride) + _CELLS_OF_A_CALL for tile in tiles
    )


def lone_tile(locality: Locality, *, align: int) -> Tile:
    """A tile of ``align`` × ``align`` cells with its whole halo, in a frame of its own: no edge is near."""
    own = Box(locality.x.halo_before, locality.y.halo_before, align, align)
    reach_x, reach_y = (axis.halo_before + align + axis.halo_after for axis in (locality.x, locality.y))
    return Tile(own, Box(0, 0, reach_x * locality.x.stride, reach_y * locality.y.stride), own)


def tile_side(tile_px: int, *, stride_px: int, align: int) -> int:
    """Cells of x_k along a tile of ``tile_px`` pixels, rounded up to a multiple of ``align`` cells."""
    return -(-tile_px // (stride_px * align)) * align


def _spans(input_length: int, output_length: int, axis: AxisLocality, tile_cells: int, align: int) -> list[_Span]:
    assert tile_cells % align == 0, "tiles must be aligned to the classifier's grid"
    count = -(-output_length // tile_cells)
    own = -(-output_length // (count * align)) * align  # even shares, as far as the grid allows
    spans = []
    for start in range(0, output_length, own):
        spans.append(_span(start, min(start + own, output_length), input_length, axis))
    return spans


def _tile(column: _Span, row: _Span, locality: Locality) -> Tile:
    own = Box.from_edges(column.own_start, row.own_start, column.own_stop, row.own_stop)
    window = Box.from_edges(column.window_start, row.window_start, column.window_stop, row.window_stop)
    offset = own.shifted(-(window.left // locality.x.stride), -(window.top // locality.y.stride))
    return Tile(own, window, offset)


def _tile_of(own: Box, input_size: Size, locality: Locality) -> Tile:
    column = _span(own.left, own.right, input_size.width, locality.x)
    row = _span(own.top, own.bottom, input_size.height, locality.y)
    return _tile(column, row, locality)


def _span(start: int, stop: int, input_length: int, axis: AxisLocality) -> _Span:
    window_start = max(0, (start - axis.halo_before) * axis.stride)
    window_stop = min(input_length, (stop + axis.halo_after) * axis.stride)
    return _Span(start, stop, window_start, window_stop)


_Runs = list[tuple[int, int]]


def _bands(
    active: npt.NDArray[np.bool_], *, halo: tuple[float, float], call: float, gap: int, most: int
) -> Iterator[tuple[int, int, _Runs]]:
    """First and last row of each band and its runs of columns, in squares: the bands whose windows have the smallest area.

    ``call`` is what a window costs beside its area.
    """
    rows = len(active)
    cost = np.zeros(rows + 1)  # of all bands from a row on
    best: list[tuple[int, _Runs]] = [(0, [])] * rows
    for top in reversed(range(rows)):
        cost[top] = np.inf
        union = np.zeros(active.shape[1], np.bool_)
        for bottom in range(top + 1, min(top + most, rows) + 1):
            union |= active[bottom - 1]
            runs = _runs(union, gap)
            height = bottom - top + halo[1]
            shares = sum(-(-(right - left) // most) for left, right in runs)
            widths = sum(right - left for left, right in runs) + shares * halo[0]
            total = widths * height + shares * call + cost[bottom]
            if total < cost[top]:
                cost[top], best[top] = total, (bottom, runs)
            if not runs:
                break  # an idle row costs nothing alone
    top = 0
    while top < rows:
        bottom, runs = best[top]
        yield top, bottom, runs
        top = bottom


def _runs(line: npt.NDArray[np.bool_], gap: int) -> _Runs:
    """Where a line is active; runs no more than ``gap`` apart are one."""
    edges = np.flatnonzero(np.diff(line, prepend=False, append=False))
    starts, stops = edges[::2], edges[1::2]
    apart = starts[1:] - stops[:-1] > gap
    if not len(starts):
        return []
    return list(zip(starts[np.append(True, apart)].tolist(), stops[np.append(apart, True)].tolist(), strict=True))


def _even_shares(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    count = -(-(stop - start) // most)
    share = -(-(stop - start) // count)
    for left in range(start, stop, share):
        yield left, min(left + share, stop)
