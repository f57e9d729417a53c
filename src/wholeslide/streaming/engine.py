"""Exact training and inference of a whole slide, tile by tile.

A stage is local, so each of its tiles needs only a window of the stage's input. A step takes two passes over a stage's tiles.
The first, without gradients, writes x_k into a store and z, the coarse grid that the classifier works on. The loss on the
whole grid then gives the gradient of every cell of z, and the decoder that of a few regions of x_k. The second pass
recomputes each tile with gradients, but for those whose graphs the plan has room to keep, and sends both back into the stage's
weights. No gradient with respect to a stage's input is ever needed, because stages are isolated.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from wholeslide.allocator import fix_thresholds, return_freed_memory
from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.objective import StageObjective
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stage_pass import StagePass, StageStep
from wholeslide.streaming.step import Observer, PixelSource, StepResult, trained_stages
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import partition, tile_side


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
        self.plan, self.device = plan, device
        self.runner = TileRunner(self.network, plan, device)

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
                work = StageStep(self.runner, objective, x, weight)
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
        x = self.runner.open_store(0, view.size)
        side = tile_side(self.plan.tile_px[0], stride_px=stem.stride, align=1)
        weights = stem.step_weights(trained=False, dtype=self.plan.execution.multiplied_dtype)
        for tile in partition(view.size, stem.locality, tile_cells=side):
            pixels = self.network.to_input(view.read(tile.cell_window))
            x.write(tile.cell_own, self.runner.run(weights, pixels, tile))
        return x

    def _forward(
        self, number: int, x_previous: FeatureStore, *, needs_grid: bool
    ) -> tuple[FeatureStore | None, Tensor | None]:
        """x_k and, where asked for, z, without gradients; the last stage's x_k is not kept."""
        work = StagePass(self.runner, number, x_previous, trained=False)
        with torch.no_grad():
            for tile in work.tiles:
                own_bchw = work.run_tile(tile)
                work.keep(tile, own_bchw, work.grid(own_bchw) if needs_grid else None)
        return work.x, work.z_bchw if needs_grid else None

    def _tidy(self) -> None:
        """Between stages: the next one's tensors have other sizes, and would not fit where these were."""
        if self.device.type == "cpu":
            return_freed_memory(self.plan.freed_bytes)
