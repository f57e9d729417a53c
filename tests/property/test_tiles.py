"""Tiles on random geometry: who owns a cell, what a window holds, and that a stack streams to the same output."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from wholeslide.geometry import Box, Size
from wholeslide.model.locality import AxisLocality, Locality, Sampling
from wholeslide.model.tracing import locality_of, trace
from wholeslide.streaming.tiles import partition, tile_side


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    kernel, dilation = draw(st.integers(1, 7)), draw(st.integers(1, 2))
    return Sampling(kernel, draw(st.integers(1, 3)), draw(st.integers(0, dilation * (kernel - 1))), dilation)


@st.composite
def axes(draw: st.DrawFn) -> AxisLocality:
    axis = AxisLocality()
    for sampling in draw(st.lists(samplings(), max_size=4)):
        axis = axis.then(sampling)
    return axis


geometry = {
    "x": axes(),
    "y": axes(),
    "width": st.integers(1, 300),
    "height": st.integers(1, 300),
    "align": st.integers(1, 9),
    "blocks": st.integers(1, 6),
}


@settings(max_examples=200, deadline=None)
@given(**geometry)
def test_each_cell_is_owned_once_by_an_aligned_tile(
    x: AxisLocality, y: AxisLocality, width: int, height: int, align: int, blocks: int
) -> None:
    size, locality = Size(width, height), Locality(x, y)
    output = locality.output_size(size)
    assume(output.area > 0)
    owners = np.zeros((output.height, output.width), dtype=int)
    for tile in partition(size, locality, tile_cells=align * blocks, align=align):
        assert not tile.cell_own.empty
        assert Box.covering(output).contains(tile.cell_own)
        assert tile.cell_own.left % align == 0
        assert tile.cell_own.top % align == 0
        assert max(tile.cell_own.width, tile.cell_own.height) <= align * blocks
        # Only the last tile of a row or column may end off the grid.
        assert tile.cell_own.right % align == 0 or tile.cell_own.right == output.width
        assert tile.cell_own.bottom % align == 0 or tile.cell_own.bottom == output.height
        owners[tile.cell_own.rows_columns] += 1
    assert (owners == 1).all()


@settings(max_examples=200, deadline=None)
@given(**geometry)
def test_windows_hold_what_their_cells_need(
    x: AxisLocality, y: AxisLocality, width: int, height: int, align: int, blocks: int
) -> None:
    size, locality = Size(width, height), Locality(x, y)
    assume(locality.output_size(size).area > 0)
    for tile in partition(size, locality, tile_cells=align * blocks, align=align):
        own, window, offset = tile.cell_own, tile.cell_window, tile.offset
        assert Box.covering(size).contains(window)
        for axis, length, span, reads, lies in (
            (x, width, (own.left, own.right), (window.left, window.right), (offset.left, offset.right)),
            (y, height, (own.top, own.bottom), (window.top, window.bottom), (offset.top, offset.bottom)),
        ):
            assert reads[0] % axis.stride == 0
            assert reads[0] <= max(0, span[0] * axis.stride - axis.before)
            assert reads[1] >= min(length, (span[1] - 1) * axis.stride + axis.after + 1)
            assert lies[0] == span[0] - reads[0] // axis.stride
            assert lies[1] - lies[0] == span[1] - span[0]
            assert lies[0] >= 0
            assert lies[1] <= axis.output_length(reads[1] - reads[0])


@settings(max_examples=200, deadline=None)
@given(**geometry)
def test_window_shapes_repeat(
    x: AxisLocality, y: AxisLocality, width: int, height: int, align: int, blocks: int
) -> None:
    """Windows between the first and the last that no edge of the image cuts are equally long."""
    size, locality = Size(width, height), Locality(x, y)
    output = locality.output_size(size)
    assume(output.area > 0)
    tiles = partition(size, locality, tile_cells=align * blocks, align=align)
    first = tiles[0].cell_own
    columns = {(t.cell_own.right, t.cell_window.left, t.cell_window.right) for t in tiles}
    rows = {(t.cell_own.bottom, t.cell_window.top, t.cell_window.bottom) for t in tiles}
    for axis, length, cells, own, spans in (
        (x, width, output.width, first.width, columns),
        (y, height, output.height, first.height, rows),
    ):
        inner = {stop - start for own_stop, start, stop in spans if own_stop < cells and start > 0 and stop < length}
        assert inner <= {(axis.halo_before + own + axis.halo_after) * axis.stride}


@settings(max_examples=200, deadline=None)
@given(**geometry)
def test_shares_are_even(x: AxisLocality, y: AxisLocality, width: int, height: int, align: int, blocks: int) -> None:
    """No more tiles than the largest side asks for, and all as wide as the first but for the last."""
    size, locality = Size(width, height), Locality(x, y)
    output = locality.output_size(size)
    assume(output.area > 0)
    tiles = partition(size, locality, tile_cells=align * blocks, align=align)
    for length, spans in (
        (output.width, sorted({(t.cell_own.left, t.cell_own.right) for t in tiles})),
        (output.height, sorted({(t.cell_own.top, t.cell_own.bottom) for t in tiles})),
    ):
        assert len(spans) <= -(-length // (align * blocks))
        widths = [stop - start for start, stop in spans]
        assert set(widths[:-1]) <= {widths[0]}
        assert widths[-1] <= widths[0]


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["conv", "max", "average"]))
    if kind == "conv":
        dilation = draw(st.integers(1, 2))
        padding = draw(st.integers(0, dilation * (kernel - 1)))
        return nn.Conv2d(1, 1, kernel, stride, padding, dilation, dtype=torch.float64)
    padding, ceil_mode = draw(st.integers(0, kernel // 2)), draw(st.booleans())
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
    return nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=draw(st.booleans()))


@settings(max_examples=120, deadline=None)
@given(
    stack=st.lists(layers(), min_size=1, max_size=4),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    align=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_tiles_join_to_the_whole_output(
    stack: list[nn.Module], width: int, height: int, align: int, blocks: int, seed: int
) -> None:
    torch.manual_seed(seed)
    network = trace(Stack(stack), "stack")
    locality, size = locality_of(network, "stack"), Size(width, height)
    assume(locality.output_size(size).area > 0)
    x_bchw = torch.randn((1, 1, height, width), dtype=torch.float64)
    with torch.no_grad():
        expected = network(x_bchw)
        joined = torch.full_like(expected, torch.nan)
        for tile in partition(size, locality, tile_cells=align * blocks, align=align):
            rows, columns = tile.cell_window.rows_columns
            own_rows, own_columns = tile.offset.rows_columns
            piece = network(x_bchw[:, :, rows, columns])[:, :, own_rows, own_columns]
            joined[:, :, tile.cell_own.rows_columns[0], tile.cell_own.rows_columns[1]] = piece
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)


def test_windows_end_at_the_edge_and_begin_at_the_halo() -> None:
    """Three tiles of 4, 4 and 2 cells by a 3x3 convolution."""
    axis = AxisLocality().then(Sampling(3, 1, 1))
    tiles = partition(Size(10, 4), Locality(axis, AxisLocality()), tile_cells=4)
    assert [(t.cell_own.left, t.cell_own.right) for t in tiles] == [(0, 4), (4, 8), (8, 10)]
    assert [(t.cell_window.left, t.cell_window.right) for t in tiles] == [(0, 5), (3, 9), (7, 10)]
    assert [t.offset.left for t in tiles] == [0, 1, 1]


@given(tile_px=st.integers(1, 5000), stride_px=st.integers(1, 64), align=st.integers(1, 9))
def test_tile_side_rounds_up_to_the_grid(tile_px: int, stride_px: int, align: int) -> None:
    side = tile_side(tile_px, stride_px=stride_px, align=align)
    assert side % align == 0
    assert side * stride_px >= tile_px
    assert (side - align) * stride_px < tile_px
