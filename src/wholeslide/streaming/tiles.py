"""A stage's output dealt to tiles, and the input window that each tile needs.

The cells that a tile owns are a fixed partition, aligned to the grid of the stage's classifier. Its window reaches out by the
halo that the stage's locality asks for; where that passes the image's edge, the window ends there and the network's own zero
padding takes over. Shares are even, so that all windows that no edge cuts are equally long: every new shape costs the convolution
library a kernel that it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.geometry import Box, Size
from wholeslide.model.locality import AxisLocality, Locality


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


def tile_side(tile_px: int, *, stride_px: int, align: int) -> int:
    """Cells of x_k along a tile of ``tile_px`` pixels, rounded up to a multiple of ``align`` cells."""
    return -(-tile_px // (stride_px * align)) * align


def _spans(input_length: int, output_length: int, axis: AxisLocality, tile_cells: int, align: int) -> list[_Span]:
    assert tile_cells % align == 0, "tiles must be aligned to the classifier's grid"
    count = -(-output_length // tile_cells)
    own = -(-output_length // (count * align)) * align  # even shares, as far as the grid allows
    spans = []
    for start in range(0, output_length, own):
        stop = min(start + own, output_length)
        window_start = max(0, (start - axis.halo_before) * axis.stride)
        window_stop = min(input_length, (stop + axis.halo_after) * axis.stride)
        spans.append(_Span(start, stop, window_start, window_stop))
    return spans


def _tile(column: _Span, row: _Span, locality: Locality) -> Tile:
    own = Box.from_edges(column.own_start, row.own_start, column.own_stop, row.own_stop)
    window = Box.from_edges(column.window_start, row.window_start, column.window_stop, row.window_stop)
    offset = own.shifted(-(window.left // locality.x.stride), -(window.top // locality.y.stride))
    return Tile(own, window, offset)
