"""Computes one tile of a stage as the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from wholeslide.geometry import Size
from wholeslide.model.folding import StepWeights
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import FeatureStore, open_store
from wholeslide.streaming.tiles import Tile, partition, tile_side


@dataclass(frozen=True)
class TileRunner:
    """Cuts stages into tiles and runs them with a plan's precision and layout on a device."""

    network: LocalNetwork
    plan: Plan
    device: torch.device

    def run(self, weights: StepWeights, window_bchw: Tensor, tile: Tile) -> Tensor:
        """The cells that a tile owns, from its window, rounded as they are stored."""
        execution = self.plan.execution
        with self.autocast():
            output = weights(execution.arrange(window_bchw))
        rows, columns = tile.offset.rows_columns
        return output.to(execution.store_dtype)[:, :, rows, columns]

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The plan's precision on this device."""
        with self.plan.execution.autocast(self.device):
            yield

    def tiles(self, number: int, input_size: Size) -> list[Tile]:
        """The tiles of stage ``number`` for an x_{k−1} of ``input_size`` cells."""
        stage, kernel = self.network.stage(number), self.network.head(number).kernel
        side = tile_side(self.plan.tile_px[number], stride_px=stage.stride, align=kernel)
        return partition(input_size, stage.locality, tile_cells=side, align=kernel)

    def open_store(self, number: int, input_size: Size) -> FeatureStore:
        """An empty store for x_k of an x_{k−1} (pixels for x_0) of ``input_size``."""
        part = self.network.stage(number) if number else self.network.stem
        return open_store(
            self.plan.store,
            part.locality.output_size(input_size),
            part.out_channels,
            dtype=self.plan.execution.store_dtype,
            device=self.device,
        )
