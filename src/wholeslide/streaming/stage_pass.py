"""The passes over one stage's tiles: forward, and in training back again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wholeslide.geometry import Box, Size
from wholeslide.model.folding import StepWeights
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.grid import GridLayout
from wholeslide.streaming.grid_gradient import classify
from wholeslide.streaming.objective import StageObjective, head_dtype
from wholeslide.streaming.region_decoding import reconstruct
from wholeslide.streaming.step import Observer
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import Tile, lone_tile


class StagePass:
    """The tiles of one stage on one slide, and what they fill: the store of x_k and the grid z.

    Where tiles leave cells out, a lone tile stands for them; they see nothing but the constant of x_{k−1}.
    """

    def __init__(
        self,
        runner: TileRunner,
        number: int,
        x_previous: FeatureStore,
        varying: VaryingPixels,
        *,
        trained: bool,
        needs_grid: bool = True,
        keeps_last: bool = False,
    ) -> None:
        self.x_previous, self._number = x_previous, number
        self._runner, network, execution = runner, runner.network, runner.plan.execution
        stage, self.head = network.stage(number), network.head(number)
        self.weights = runner.step_weights(number, trained=trained)
        with torch.set_grad_enabled(trained):  # cast once, as the stage's own weights are
            dtype, weight = execution.multiplied_dtype, self.head.to_grid.weight
            self._grid_weight = weight if dtype is None else weight.to(dtype)
        has_constant = x_previous.constant_c is not None
        self.tiles = runner.tiles(number, x_previous.size, varying if has_constant else None)
        self.x_size = stage.locality.output_size(x_previous.size)
        self.x = runner.open_store(number, x_previous.size) if keeps_last or number < network.depth else None
        grid_boxes = [self._grid_box(tile) for tile in self.tiles]
        grid_size = Size(self.head.grid_length(self.x_size.width), self.head.grid_length(self.x_size.height))
        self.layout = GridLayout.of_boxes(grid_size, grid_boxes)
        self.lone = lone_tile(stage.locality, align=self.head.kernel) if self.layout.elided else None
        ends = np.cumsum([box.size.area for box in grid_boxes]).tolist()
        self._rows = {
            tile: slice(end - box.size.area, end) for tile, box, end in zip(self.tiles, grid_boxes, ends, strict=True)
        }
        shape = (self.layout.rows * needs_grid, self.head.to_grid.out_channels)
        self.z_nc = torch.empty(shape, dtype=execution.parameter_dtype, device=runner.device)

    @property
    def everything(self) -> list[Tile]:
        """The lone tile, where there is one, and the others."""
        return self.tiles if self.lone is None else [self.lone, *self.tiles]

    def run(self, tiles: list[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        """Each tile and the cells of x_k that it owns, in this order; a lone tile comes first."""
        if tiles and tiles[0] is self.lone:
            yield self.lone, self._runner.run(self.weights, self._constant_window(self.lone), self.lone)
            tiles = tiles[1:]
        windows = self.x_previous.regions(tile.cell_window for tile in tiles)
        for tile, window_bchw in zip(tiles, windows, strict=True):
            self._runner.make_room(self._runner.plan.tile_bytes(self._number))
            yield tile, self._runner.run(self.weights, window_bchw, tile)

    def grid(self, own_bchw: Tensor) -> Tensor:
        """The part of z above a tile's own cells."""
        with self._runner.autocast():
            grid_bchw = self.head.grid(self._runner.real(self._number, own_bchw), self._grid_weight)
        return grid_bchw.to(head_dtype(grid_bchw.dtype))

    def keep(self, tile: Tile, own_bchw: Tensor, grid_bchw: Tensor | None) -> None:
        """Write a tile's features and its part of z; the lone tile's are the constants of both."""
        if self.x is not None and tile is self.lone:
            self.x.constant_c = own_bchw.detach()[0, :, 0, 0].clone()
        elif self.x is not None:
            self.x.write(tile.cell_own, own_bchw.detach())
        if grid_bchw is not None:
            rows = self._rows_of(tile)
            self.z_nc[rows] = grid_bchw.detach()[0].flatten(1).T[: rows.stop - rows.start]

    def grid_gradient(self, tile: Tile, z_gradient_nc: Tensor) -> Tensor | None:
        """A tile's share of the gradient of z, (1, C, h, w); nothing where no row is its own."""
        box, share_nc = self._grid_box(tile), z_gradient_nc[self._rows_of(tile)]
        return share_nc.T.view(1, -1, box.height, box.width) if len(share_nc) else None

    def _constant_window(self, tile: Tile) -> Tensor:
        constant_c, size = self.x_previous.constant_c, tile.cell_window.size
        assert constant_c is not None
        return constant_c[None, :, None, None].repeat(1, 1, size.height, size.width)

    def _rows_of(self, tile: Tile) -> slice:
        """Of z; the lone tile, which may look like one of the others, has the last one, or none."""
        return slice(len(self.layout.cell_n), self.layout.rows) if tile is self.lone else self._rows[tile]

    def _grid_box(self, tile: Tile) -> Box:
        """The cells of the grid above a tile."""
        own, length = tile.cell_own, self.head.grid_length
        left, top = own.left // self.head.kernel, own.top // self.head.kernel
        return Box(left, top, length(own.width), length(own.height))


class _TileGraph(NamedTuple):
    """A tile's own cells of x_k and its part of z, with the graph that leads back to the stage's weights."""

    tile: Tile
    own_bchw: Tensor
    grid_bchw: Tensor


class StageStep:
    """One stage's share of a training step: two passes over its tiles, with the loss between them.

    The last tiles of the first pass, as many as the plan allows, keep their graphs and are not computed again.
    """

    def __init__(
        self,
        runner: TileRunner,
        objective: StageObjective,
        x_previous: FeatureStore,
        varying: VaryingPixels,
        weight: float,
    ) -> None:
        self._runner, self._objective, self._weight = runner, objective, weight
        self._work = StagePass(runner, objective.number, x_previous, varying, trained=True)
        self.classification_loss = self.reconstruction_loss = math.nan
        self.probabilities: np.ndarray | None = None

    def run(self, observer: Observer | None) -> FeatureStore | None:
        """Accumulate the stage's gradients; x_k, or nothing for the last stage."""
        work = self._work
        recomputed, kept = self._share_out()
        with torch.no_grad():
            for graph in self._graphs(recomputed):
                work.keep(*graph)
        graphs = []
        for graph in self._graphs(kept):
            graphs.append(graph)
            work.keep(*graph)
        if observer is not None:
            observer(self._objective.number, work.x, work.layout.whole(work.z_nc))
        z_gradient = self._classify()
        self._runner.make_room(self._runner.plan.decoder_bytes(self._objective.number))
        regions, x_gradients_rchw = self._reconstruct()
        while graphs:  # each is let go as soon as it is used
            self._runner.make_room(self._runner.plan.tile_bytes(self._objective.number))
            self._backward(graphs.pop(), z_gradient, regions, x_gradients_rchw)
        for graph in self._graphs(recomputed):
            self._backward(graph, z_gradient, regions, x_gradients_rchw)
        self._runner.make_room(self._runner.plan.tile_bytes(self._objective.number))
        assert isinstance(work.weights, StepWeights)
        work.weights.backward()
        return work.x

    def _share_out(self) -> tuple[list[Tile], list[Tile]]:
        """The tiles that are computed twice, the lone one first, and the last ones, whose graphs the plan has room to keep."""
        tiles = self._work.tiles
        first_kept = self._runner.first_kept(self._objective.number, tiles)
        lone = [] if self._work.lone is None else [self._work.lone]
        return lone + tiles[:first_kept], tiles[first_kept:]

    def _graphs(self, tiles: list[Tile]) -> Iterator[_TileGraph]:
        for tile, own_bchw in self._work.run(tiles):
            yield _TileGraph(tile, own_bchw, self._work.grid(own_bchw))

    def _classify(self) -> Tensor:
        """The gradient of the loss on the whole grid; the classifier's own gradients are accumulated on the way."""
        objective, work = self._objective, self._work
        self.classification_loss, probabilities = classify(
            work.head,
            objective.decision,
            work.z_nc,
            work.layout,
            kept_n=objective.survivors(work.layout, work.z_nc),
            weight=self._weight,
        )
        self.probabilities = probabilities.cpu().numpy()
        return work.z_nc

    def _reconstruct(self) -> tuple[list[Box], Tensor | None]:
        """The regions and the gradients of their features, (R, C, h, w); the decoder's are accumulated on the way."""
        cell_regions = self._objective.regions(self._work.x_size)
        if not cell_regions or self._work.x is None:
            return [], None
        targets = list(
            self._work.x_previous.regions(self._objective.target_boxes(cell_regions, self._work.x_previous.size))
        )
        self.reconstruction_loss, x_gradients_rchw = reconstruct(
            self._objective,
            self._runner.plan.execution.arrange(torch.cat(list(self._work.x.regions(cell_regions)))),
            targets,
            weight=self._weight * self._runner.network.config.reconstruction_weight,
            autocast=self._runner.autocast,
        )
        return cell_regions, x_gradients_rchw

    def _backward(
        self, graph: _TileGraph, z_gradient_nc: Tensor, cell_regions: list[Box], x_gradients_rchw: Tensor | None
    ) -> None:
        """Send a tile's share of both gradients back at once."""
        tile, own_bchw, grid_bchw = graph
        shares = [(grid_bchw, self._work.grid_gradient(tile, z_gradient_nc))]
        if x_gradients_rchw is not None and own_bchw.requires_grad:
            shares.append((own_bchw, self._feature_gradient(tile, own_bchw, cell_regions, x_gradients_rchw)))
        there = [(tensor, gradient) for tensor, gradient in shares if gradient is not None]
        torch.autograd.backward([tensor for tensor, _ in there], [gradient for _, gradient in there])

    def _feature_gradient(
        self, tile: Tile, own_bchw: Tensor, cell_regions: list[Box], x_gradients_rchw: Tensor
    ) -> Tensor | None:
        if tile is self._work.lone:
            owned = [other.cell_own for other in self._work.tiles]
            return _share_of_the_constant(own_bchw, owned, cell_regions, x_gradients_rchw)
        return _share_of_regions(tile.cell_own, own_bchw, cell_regions, x_gradients_rchw)


def _share_of_regions(
    cell_own: Box, own_bchw: Tensor, cell_regions: list[Box], x_gradients_rchw: Tensor
) -> Tensor | None:
    """The sum of the regions' gradients over a tile's own cells; nothing where no region touches it."""
    share: Tensor | None = None
    for region, gradient_chw in zip(cell_regions, x_gradients_rchw, strict=True):
        common = cell_own.intersection(region)
        if common.empty:
            continue
        if share is None:
            share = torch.zeros_like(own_bchw)
        own_rows, own_columns = common.relative_to(cell_own).rows_columns
        rows, columns = common.relative_to(region).rows_columns
        share[0, :, own_rows, own_columns] += gradient_chw[:, rows, columns]
    return share


def _share_of_the_constant(
    own_bchw: Tensor, owned: list[Box], cell_regions: list[Box], x_gradients_rchw: Tensor
) -> Tensor | None:
    """The sum of the regions' gradients over the cells that no tile owns, sent to the one cell that stands for them."""
    total_c: Tensor | None = None
    for region, gradient_chw in zip(cell_regions, x_gradients_rchw, strict=True):
        elided_hw = torch.ones((region.height, region.width), dtype=torch.bool)
        for box in owned:
            elided_hw[box.intersection(region).relative_to(region).rows_columns] = False
        if elided_hw.any():
            cells_cn = gradient_chw[:, elided_hw.to(gradient_chw.device)].to(head_dtype(gradient_chw.dtype))
            total_c = cells_cn.sum(dim=1) if total_c is None else total_c + cells_cn.sum(dim=1)
    if total_c is None:
        return None
    share = torch.zeros_like(own_bchw)
    share[0, :, 0, 0] = total_c
    return share
