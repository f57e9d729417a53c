"""The passes over one stage's tiles: forward, and in training back again."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wholeslide.geometry import Box
from wholeslide.streaming.objective import StageObjective, head_dtype
from wholeslide.streaming.step import Observer
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import Tile


class StagePass:
    """The tiles of one stage on one slide, and what they fill: the store of x_k and the grid z."""

    def __init__(self, runner: TileRunner, number: int, x_previous: FeatureStore, *, trained: bool) -> None:
        self.x_previous = x_previous
        self._runner, network, execution = runner, runner.network, runner.plan.execution
        self.weights = network.stage(number).step_weights(trained=trained, dtype=execution.multiplied_dtype)
        self.tiles = runner.tiles(number, x_previous.size)
        self.x_size = network.stage(number).locality.output_size(x_previous.size)
        self.x = runner.open_store(number, x_previous.size) if number < network.depth else None
        self._head = head = network.head(number)
        with torch.set_grad_enabled(trained):  # cast once, as the stage's own weights are
            dtype = execution.multiplied_dtype
            self._grid_weight = head.to_grid.weight if dtype is None else head.to_grid.weight.to(dtype)
        shape = (
            1,
            head.to_grid.out_channels,
            head.grid_length(self.x_size.height),
            head.grid_length(self.x_size.width),
        )
        self.z_bchw = torch.empty(shape, dtype=execution.parameter_dtype, device=runner.device)

    def run_tile(self, tile: Tile) -> Tensor:
        """The cells of x_k that a tile owns."""
        return self._runner.run(self.weights, self.x_previous.read(tile.cell_window), tile)

    def grid_slices(self, tile: Tile) -> tuple[slice, slice, slice, slice]:
        """Where a tile's part of z lies."""
        head, own = self._head, tile.cell_own
        top, left = own.top // head.kernel, own.left // head.kernel
        bottom, right = head.grid_length(own.bottom), head.grid_length(own.right)
        return slice(None), slice(None), slice(top, bottom), slice(left, right)

    def grid(self, own_bchw: Tensor) -> Tensor:
        """The part of z above a tile's own cells."""
        with self._runner.autocast():
            grid_bchw = self._head.grid(own_bchw, self._grid_weight)
        return grid_bchw.to(head_dtype(grid_bchw.dtype))

    def keep(self, tile: Tile, own_bchw: Tensor, grid_bchw: Tensor | None) -> None:
        """Write a tile's features and its part of z."""
        if self.x is not None:
            self.x.write(tile.cell_own, own_bchw.detach())
        if grid_bchw is not None:
            self.z_bchw[self.grid_slices(tile)] = grid_bchw.detach()


class _TileGraph(NamedTuple):
    """A tile's own cells of x_k and its part of z, with the graph that leads back to the stage's weights."""

    tile: Tile
    own_bchw: Tensor
    grid_bchw: Tensor


class StageStep:
    """One stage's share of a training step: two passes over its tiles, with the loss between them.

    The last tiles of the first pass, as many as the plan allows, keep their graphs and are not computed again.
    """

    def __init__(self, runner: TileRunner, objective: StageObjective, x_previous: FeatureStore, weight: float) -> None:
        self._runner, self._objective, self._weight = runner, objective, weight
        self._work = StagePass(runner, objective.number, x_previous, trained=True)
        self.classification_loss = self.reconstruction_loss = math.nan
        self.probabilities: np.ndarray | None = None

    def run(self, observer: Observer | None) -> FeatureStore | None:
        """Accumulate the stage's gradients; x_k, or nothing for the last stage."""
        work = self._work
        recomputed, kept = self._share_out()
        with torch.no_grad():
            for tile in recomputed:
                work.keep(*self._graph(tile))
        graphs = []
        for tile in kept:
            graphs.append(self._graph(tile))
            work.keep(*graphs[-1])
        if observer is not None:
            observer(self._objective.number, work.x, work.z_bchw.detach())
        z_gradient = self._classify()
        regions, x_gradients_rchw = self._reconstruct()
        while graphs:  # each is let go as soon as it is used
            self._backward(graphs.pop(), z_gradient, regions, x_gradients_rchw)
        for tile in recomputed:
            self._backward(self._graph(tile), z_gradient, regions, x_gradients_rchw)
        work.weights.backward()
        return work.x

    def _share_out(self) -> tuple[list[Tile], list[Tile]]:
        """The tiles that are computed twice, and the last ones, whose graphs the plan has room to keep."""
        stage, tiles = self._runner.network.stage(self._objective.number), self._work.tiles
        cell_px = stage.stride // stage.locality.stride
        room_px = self._runner.plan.kept_px[self._objective.number]
        first_kept = len(tiles)
        while first_kept > 0:
            room_px -= tiles[first_kept - 1].cell_window.size.area * cell_px**2
            if room_px < 0:
                break
            first_kept -= 1
        return tiles[:first_kept], tiles[first_kept:]

    def _graph(self, tile: Tile) -> _TileGraph:
        own_bchw = self._work.run_tile(tile)
        return _TileGraph(tile, own_bchw, self._work.grid(own_bchw))

    def _classify(self) -> Tensor:
        """The gradient of the loss on the whole grid; the classifier's own gradients are accumulated on the way."""
        z_bchw = self._work.z_bchw.requires_grad_()
        loss, probabilities = self._objective.classification(z_bchw)
        torch.autograd.backward([loss * self._weight])
        self.classification_loss, self.probabilities = loss.item(), probabilities.cpu().numpy()
        assert z_bchw.grad is not None
        return z_bchw.grad

    def _reconstruct(self) -> tuple[list[Box], Tensor | None]:
        """The regions and the gradients of their features, (R, C, h, w); the decoder's are accumulated on the way."""
        cell_regions = self._objective.regions(self._work.x_size)
        if not cell_regions or self._work.x is None:
            return [], None
        targets = [
            self._work.x_previous.read(box)
            for box in self._objective.target_boxes(cell_regions, self._work.x_previous.size)
        ]
        regions_rchw = torch.cat([self._work.x.read(region) for region in cell_regions])
        regions_rchw = self._runner.plan.execution.arrange(regions_rchw).requires_grad_()
        with self._runner.autocast():
            loss = self._objective.reconstruction(regions_rchw, targets)
        torch.autograd.backward([loss * (self._weight * self._runner.network.config.reconstruction_weight)])
        self.reconstruction_loss = loss.item()
        return cell_regions, regions_rchw.grad

    def _backward(
        self, graph: _TileGraph, z_gradient: Tensor, cell_regions: list[Box], x_gradients_rchw: Tensor | None
    ) -> None:
        """Send a tile's share of both gradients back at once."""
        tile, own_bchw, grid_bchw = graph
        tensors, gradients = [grid_bchw], [z_gradient[self._work.grid_slices(tile)]]
        if x_gradients_rchw is not None and own_bchw.requires_grad:
            share = _share_of_regions(tile.cell_own, own_bchw, cell_regions, x_gradients_rchw)
            if share is not None:
                tensors.append(own_bchw)
                gradients.append(share)
        torch.autograd.backward(tensors, gradients)


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
