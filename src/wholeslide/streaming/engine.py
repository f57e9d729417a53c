"""Exact training and inference of a whole slide, tile by tile.

A stage is local, so each of its tiles needs only a window of the stage's input. A step takes two passes over a stage's tiles.
The first, without gradients, writes x_k into a store and z, the coarse grid that the classifier works on. The loss on the
whole grid then gives the gradient of every cell of z, and the decoder that of a few regions of x_k. The second pass
recomputes each tile with gradients, but for those whose graphs the plan has room to keep, and sends both back into the stage's
weights. No gradient with respect to a stage's input is ever needed, because stages are isolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wholeslide.allocator import fix_thresholds, return_freed_memory
from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.folding import StepWeights
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.objective import StageObjective, head_dtype
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import FeatureStore, open_store
from wholeslide.streaming.tiles import Tile, partition, tile_side


class PixelSource(Protocol):
    """What a slide gives to the network: a size in pixels, and boxes of pixels, (h, w, 3) float32 in [0, 1]."""

    @property
    def size(self) -> Size: ...

    def read(self, px_box: Box) -> np.ndarray: ...


@dataclass(frozen=True)
class StepResult:
    """What a step saw of one slide; lists have an entry for each stage, NaN where a stage was not trained.

    ``probabilities`` is (K, classes), of each stage's classifier, with dropout as in training.
    """

    classification_losses: list[float]
    reconstruction_losses: list[float]
    probabilities: np.ndarray


#: Called with the stage's number, its features as stored (``None`` for the last stage, which keeps none; closed soon after)
#: and its grid: by a step for each stage that is trained, by a prediction for all.
Observer = Callable[[int, FeatureStore | None, Tensor], None]


class StreamingEngine:
    """Runs a network over slides of any size in the memory that a plan allows.

    Args:
        network: moved to ``device`` and to the plan's parameter type in place.
        plan: tile sizes, precision, layout and store.
        device: where tiles are computed.
    """

    def __init__(self, network: LocalNetwork, plan: Plan, device: torch.device) -> None:
        fix_thresholds()
        self.network = network.to(device=device, dtype=plan.execution.parameter_dtype)
        self.network.train()
        self.plan = plan
        self.device = device

    def step(
        self,
        view: PixelSource,
        label: int,
        draws: Draws,
        *,
        weight: float = 1.0,
        stages: Collection[int] | None = None,
        observer: Observer | None = None,
    ) -> StepResult:
        """Forward and backward of one slide: adds ``weight`` times each stage's own gradient to its parameters' ``.grad``.

        Args:
            view: the slide.
            label: index of its class.
            draws: of this slide in this epoch; they decide regions and dropout.
            weight: factor on the gradients, one over the number of slides that are accumulated.
            stages: numbers of the stages that are trained, counted from 1; all by default. Later ones are not run.
            observer: sees each trained stage's features and grid.

        Raises:
            ConfigError: the view has not the size that the network pads to, or there is no such stage.
            SlideError: the slide could not be read. As after any error, gradients are then incomplete.
        """
        depth = self.network.depth
        trained = trained_stages(self.network, stages)
        classification, reconstruction = [math.nan] * depth, [math.nan] * depth
        probabilities: list[np.ndarray | None] = [None] * depth
        x = self._stem(view)
        for number in range(1, max(trained) + 1):
            if number in trained:
                objective = StageObjective(self.network, number, label, draws, view.size)
                work = _StageStep(self, objective, x, weight)
                x_next = work.run(observer)
                classification[number - 1] = work.classification_loss
                reconstruction[number - 1] = work.reconstruction_loss
                probabilities[number - 1] = work.probabilities
                del work  # its weights and gradients, before the next stage makes its own
            else:
                x_next = self._forward(number, x, needs_grid=False)[0]
            x.close()
            self._tidy()
            x = x_next if x_next is not None else x
        x.close()
        classes = next(p for p in probabilities if p is not None).size
        rows = [np.full(classes, math.nan) if row is None else row for row in probabilities]
        return StepResult(classification, reconstruction, np.stack(rows))

    @torch.no_grad()
    def predict(self, view: PixelSource, *, observer: Observer | None = None) -> np.ndarray:
        """Class probabilities of every stage's classifier, (K, classes) float64; the last row is the final classifier's.

        Raises:
            ConfigError: the view has not the size that the network pads to.
            SlideError: the slide could not be read.
        """
        rows = []
        x = self._stem(view)
        for number in range(1, self.network.depth + 1):
            x_next, z_bchw = self._forward(number, x, needs_grid=True)
            assert z_bchw is not None
            x.close()
            self._tidy()
            if observer is not None:
                observer(number, x_next, z_bchw)
            logits = self.network.head(number)(z_bchw).logits
            rows.append(torch.softmax(logits.double(), dim=0).cpu().numpy())
            x = x_next if x_next is not None else x
        x.close()
        return np.stack(rows)

    @torch.no_grad()
    def _stem(self, view: PixelSource) -> FeatureStore:
        """x_0: pixels through the frozen stem."""
        needed = self.network.padded_size(view.size)
        if needed != view.size:
            raise ConfigError.single(
                "not a size that the network divides",
                where=f"view of {view.size} pixels",
                remedy=f"pad it with background to network.padded_size(view.size), which is {needed}",
            )
        stem = self.network.stem
        x = self._open_store(0, view.size)
        side = tile_side(self.plan.tile_px[0], stride_px=stem.stride, align=1)
        weights = stem.step_weights(trained=False, dtype=self.plan.execution.multiplied_dtype)
        for tile in partition(view.size, stem.locality, tile_cells=side):
            pixels = self.network.to_input(view.read(tile.cell_window))
            x.write(tile.cell_own, self.run_tile(weights, pixels, tile))
        return x

    def _forward(
        self, number: int, x_previous: FeatureStore, *, needs_grid: bool
    ) -> tuple[FeatureStore | None, Tensor | None]:
        """x_k and, where asked for, z, without gradients; the last stage's x_k is not kept."""
        work = _StagePass(self, number, x_previous, trained=False)
        with torch.no_grad():
            for tile in work.tiles:
                own_bchw = work.run_tile(tile)
                work.keep(tile, own_bchw, work.grid(own_bchw) if needs_grid else None)
        return work.x, work.z_bchw if needs_grid else None

    def _tidy(self) -> None:
        """Between stages: the next one's tensors have other sizes, and would not fit where these were."""
        if self.device.type == "cpu":
            return_freed_memory(self.plan.freed_bytes)

    def run_tile(self, weights: StepWeights, window_bchw: Tensor, tile: Tile) -> Tensor:
        """The cells that a tile owns, from its window, rounded as they are stored."""
        execution = self.plan.execution
        with execution.autocast(self.device):
            output = weights(execution.arrange(window_bchw))
        rows, columns = tile.offset.rows_columns
        return output.to(execution.store_dtype)[:, :, rows, columns]

    def tiles(self, number: int, input_size: Size) -> list[Tile]:
        """The tiles of stage ``number`` for an x_{k−1} of ``input_size`` cells."""
        stage, kernel = self.network.stage(number), self.network.head(number).kernel
        side = tile_side(self.plan.tile_px[number], stride_px=stage.stride, align=kernel)
        return partition(input_size, stage.locality, tile_cells=side, align=kernel)

    def _open_store(self, number: int, input_size: Size) -> FeatureStore:
        """An empty store for x_k of an x_{k−1} (pixels for x_0) of ``input_size``."""
        part = self.network.stage(number) if number else self.network.stem
        return open_store(
            self.plan.store,
            part.locality.output_size(input_size),
            part.out_channels,
            dtype=self.plan.execution.store_dtype,
            device=self.device,
        )


def trained_stages(network: LocalNetwork, stages: Collection[int] | None) -> set[int]:
    """The numbers of the stages that a step trains.

    Raises:
        ConfigError: there are none, or the network has no such stage.
    """
    every = set(range(1, network.depth + 1))
    chosen = every if stages is None else set(stages)
    if not chosen or not chosen <= every:
        raise ConfigError.single(
            f"no such choice of {network.depth} stages",
            where=f"stages={sorted(chosen)}",
            remedy="name at least one, counted from 1",
        )
    return chosen


class _StagePass:
    """The tiles of one stage on one slide, and what they fill: the store of x_k and the grid z."""

    def __init__(self, engine: StreamingEngine, number: int, x_previous: FeatureStore, *, trained: bool) -> None:
        self.engine, self.number, self.x_previous = engine, number, x_previous
        network = engine.network
        self.weights = network.stage(number).step_weights(trained=trained, dtype=engine.plan.execution.multiplied_dtype)
        self.tiles = engine.tiles(number, x_previous.size)
        self.x_size = network.stage(number).locality.output_size(x_previous.size)
        self.x = engine._open_store(number, x_previous.size) if number < network.depth else None
        self._head = head = network.head(number)
        with torch.set_grad_enabled(trained):  # cast once, as the stage's own weights are
            dtype = engine.plan.execution.multiplied_dtype
            self._grid_weight = head.to_grid.weight if dtype is None else head.to_grid.weight.to(dtype)
        shape = (
            1,
            head.to_grid.out_channels,
            head.grid_length(self.x_size.height),
            head.grid_length(self.x_size.width),
        )
        self.z_bchw = torch.empty(shape, dtype=engine.plan.execution.parameter_dtype, device=engine.device)

    def run_tile(self, tile: Tile) -> Tensor:
        """The cells of x_k that a tile owns."""
        return self.engine.run_tile(self.weights, self.x_previous.read(tile.cell_window), tile)

    def grid_slices(self, tile: Tile) -> tuple[slice, slice, slice, slice]:
        """Where a tile's part of z lies."""
        head, own = self.engine.network.head(self.number), tile.cell_own
        top, left = own.top // head.kernel, own.left // head.kernel
        bottom, right = head.grid_length(own.bottom), head.grid_length(own.right)
        return slice(None), slice(None), slice(top, bottom), slice(left, right)

    def grid(self, own_bchw: Tensor) -> Tensor:
        """The part of z above a tile's own cells."""
        with self.engine.plan.execution.autocast(self.engine.device):
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


class _StageStep:
    """One stage's share of a training step: two passes over its tiles, with the loss between them.

    The last tiles of the first pass, as many as the plan allows, keep their graphs and are not computed again.
    """

    def __init__(
        self, engine: StreamingEngine, objective: StageObjective, x_previous: FeatureStore, weight: float
    ) -> None:
        self.engine, self.objective, self.x_previous, self.weight = engine, objective, x_previous, weight
        self.work = _StagePass(engine, objective.number, x_previous, trained=True)
        self.classification_loss = self.reconstruction_loss = math.nan
        self.probabilities: np.ndarray | None = None

    def run(self, observer: Observer | None) -> FeatureStore | None:
        """Accumulate the stage's gradients; x_k, or nothing for the last stage."""
        work = self.work
        recomputed, kept = self._share_out()
        with torch.no_grad():
            for tile in recomputed:
                work.keep(*self._graph(tile))
        graphs = []
        for tile in kept:
            graphs.append(self._graph(tile))
            work.keep(*graphs[-1])
        if observer is not None:
            observer(self.objective.number, work.x, work.z_bchw.detach())
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
        stage, tiles = self.engine.network.stage(self.objective.number), self.work.tiles
        cell_px = stage.stride // stage.locality.stride
        room_px = self.engine.plan.kept_px[self.objective.number]
        first_kept = len(tiles)
        while first_kept > 0:
            room_px -= tiles[first_kept - 1].cell_window.size.area * cell_px**2
            if room_px < 0:
                break
            first_kept -= 1
        return tiles[:first_kept], tiles[first_kept:]

    def _graph(self, tile: Tile) -> _TileGraph:
        own_bchw = self.work.run_tile(tile)
        return _TileGraph(tile, own_bchw, self.work.grid(own_bchw))

    def _classify(self) -> Tensor:
        """The gradient of the loss on the whole grid; the classifier's own gradients are accumulated on the way."""
        z_bchw = self.work.z_bchw.requires_grad_()
        loss, probabilities = self.objective.classification(z_bchw)
        torch.autograd.backward([loss * self.weight])
        self.classification_loss, self.probabilities = loss.item(), probabilities.cpu().numpy()
        assert z_bchw.grad is not None
        return z_bchw.grad

    def _reconstruct(self) -> tuple[list[Box], Tensor | None]:
        """The regions and the gradients of their features, (R, C, h, w); the decoder's are accumulated on the way."""
        cell_regions = self.objective.regions(self.work.x_size)
        if not cell_regions or self.work.x is None:
            return [], None
        targets = [self.x_previous.read(box) for box in self.objective.target_boxes(cell_regions, self.x_previous.size)]
        regions_rchw = torch.cat([self.work.x.read(region) for region in cell_regions])
        regions_rchw = self.engine.plan.execution.arrange(regions_rchw).requires_grad_()
        with self.engine.plan.execution.autocast(self.engine.device):
            loss = self.objective.reconstruction(regions_rchw, targets)
        torch.autograd.backward([loss * (self.weight * self.engine.network.config.reconstruction_weight)])
        self.reconstruction_loss = loss.item()
        return cell_regions, regions_rchw.grad

    def _backward(
        self, graph: _TileGraph, z_gradient: Tensor, cell_regions: list[Box], x_gradients_rchw: Tensor | None
    ) -> None:
        """Send a tile's share of both gradients back at once."""
        tile, own_bchw, grid_bchw = graph
        tensors, gradients = [grid_bchw], [z_gradient[self.work.grid_slices(tile)]]
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
