"""Computes one tile of a stage as the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wholeslide.allocator import Room
from wholeslide.geometry import Size
from wholeslide.model.compilation import CompiledPart
from wholeslide.model.folding import StepWeights
from wholeslide.model.network import LocalNetwork
from wholeslide.model.quantization import QuantizedPart, stored_pixels
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stores import FeatureStore, PagePool, open_store
from wholeslide.streaming.tiles import STEM_ALIGN, Tile, cover, lone_tile, partition, tile_side, work_cells

PartWeights = StepWeights | QuantizedPart | CompiledPart
"""What turns the windows of the stem, or of one stage, into its features."""


@dataclass(frozen=True)
class TileRunner:
    """Cuts stages into tiles and runs them with a plan's precision and layout on a device.

    With ``quantized`` or ``compiled`` parts, the stem and the stages, it only predicts: those compute. Features of quantized
    ones are integers.
    """

    network: LocalNetwork
    plan: Plan
    device: torch.device
    store_folder: Path | None = None
    quantized: tuple[QuantizedPart, ...] = ()
    compiled: tuple[CompiledPart, ...] = ()
    _room: Room = field(default_factory=Room, repr=False, compare=False)
    _pages: PagePool = field(default_factory=PagePool, repr=False, compare=False)

    def step_weights(self, number: int, *, trained: bool) -> PartWeights:
        """What computes the tiles of stage ``number``, or of the stem (0), on one slide."""
        prepared = self.quantized or self.compiled
        if prepared:
            assert not trained
            return prepared[number]
        part = self.network.stage(number) if number else self.network.stem
        return part.step_weights(trained=trained, dtype=self.plan.execution.multiplied_dtype)

    def run(self, weights: PartWeights, window_bchw: Tensor, tile: Tile) -> Tensor:
        """The cells that a tile owns, from its window, rounded as they are stored."""
        rows, columns = tile.offset.rows_columns
        execution = self.plan.execution
        with self.autocast():
            output = weights(window_bchw if self.quantized else execution.arrange(window_bchw))
        own = output[:, :, rows, columns]
        return own if own.dtype == torch.uint8 else own.to(execution.store_dtype)

    def to_input(self, pixels_hwc: np.ndarray) -> Tensor:
        """Pixels as the stem takes them, (1, 3, h, w)."""
        return stored_pixels(pixels_hwc) if self.quantized else self.network.to_input(pixels_hwc)

    def real(self, number: int, x_bchw: Tensor) -> Tensor:
        """The numbers that features of x_k stand for."""
        return self.quantized[number].real(x_bchw) if self.quantized else x_bchw

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The plan's precision on this device."""
        with self.plan.execution.autocast(self.device):
            yield

    def tiles(self, number: int, input_size: Size, varying: VaryingPixels | None = None) -> list[Tile]:
        """The tiles of stage ``number`` for an x_{k−1} of ``input_size`` cells, but for what sees nothing but background."""
        stage, kernel = self.network.stage(number), self.network.head(number).kernel
        side = tile_side(self.plan.tile_px[number], stride_px=stage.stride, align=kernel)
        everything = partition(input_size, stage.locality, tile_cells=side, align=kernel)
        if varying is None or not varying.anywhere_constant:
            return everything
        lone, largest = lone_tile(stage.locality, align=kernel), max(tile.cell_window.size.area for tile in everything)
        if lone.cell_window.size.area > largest:  # the view cuts every window: one that it does not cut is in no plan
            return everything
        x_size = stage.locality.output_size(input_size)
        active = varying.seen_by(self.network.reach(number), x_size, side=kernel)
        active[-1] |= x_size.height % kernel > 0  # the grid's last cells see zeros instead of x_k
        active[:, -1] |= x_size.width % kernel > 0
        needed = cover(active, input_size, stage.locality, tile_cells=side, align=kernel)
        return min(needed, everything, key=lambda tiles: work_cells(tiles, stage.locality))

    def first_kept(self, number: int, tiles: list[Tile]) -> int:
        """From which tile of stage ``number`` on the plan has room to keep the graphs."""
        room_px, first = self.plan.kept_px[number], len(tiles)
        while first > 0 and (room_px := room_px - self.window_px(number, tiles[first - 1])) >= 0:
            first -= 1
        return first

    def window_px(self, number: int, tile: Tile) -> int:
        """Pixels below a tile's window."""
        stage = self.network.stage(number)
        return tile.cell_window.size.area * (stage.stride // stage.locality.stride) ** 2

    def stem_tiles(self, view_size: Size) -> list[Tile]:
        """The tiles of the stem for a view of ``view_size`` pixels."""
        stem = self.network.stem
        side = tile_side(self.plan.tile_px[0], stride_px=stem.stride, align=STEM_ALIGN)
        return partition(view_size, stem.locality, tile_cells=side, align=STEM_ALIGN)

    @torch.inference_mode()
    def run_examples(self) -> None:
        """Predict a few windows of the stem and of each stage, as the plan has them, that hold nothing."""
        execution = self.plan.execution
        for number in range(self.network.depth + 1):
            dtype = torch.uint8 if self.quantized else execution.store_dtype if number else execution.parameter_dtype
            weights = self.step_weights(number, trained=False)
            for shape, tile in self._example_windows(number):
                self.run(weights, torch.zeros(shape, dtype=dtype, device=self.device), tile)

    def _example_windows(self, number: int) -> Iterator[tuple[tuple[int, int, int, int], Tile]]:
        """Shapes of windows of stage ``number``, or of the stem (0), with their tiles: the plan's largest, smallest, background's.

        None has equal sides: what torch compiles for such takes no others.
        """
        view_size = self.network.padded_size(self.plan.largest)
        part, tiles, align = self.network.stem, self.stem_tiles(view_size), 1
        if number:
            part, align = self.network.stage(number), self.network.head(number).kernel
            tiles = self.tiles(number, self.network.feature_size(view_size, number - 1))
        by_size = sorted(tiles, key=lambda tile: tile.cell_window.size.area)
        for tile in (by_size[-1], by_size[0], lone_tile(part.locality, align=align)):
            height, width = tile.cell_window.height, tile.cell_window.width
            yield (1, part.in_channels, height, width + part.locality.x.stride * (width == height)), tile

    def needed_of_stem(self, tile: Tile, view_size: Size, varying: VaryingPixels) -> list[Tile]:
        """The parts of a tile of the stem that see more than background."""
        locality, own = self.network.stem.locality, tile.cell_own
        active = varying.seen_by(locality, locality.output_size(view_size), side=STEM_ALIGN, within=own)
        if active.all():
            return [tile]
        side = tile_side(self.plan.tile_px[0], stride_px=self.network.stem.stride, align=STEM_ALIGN)
        return cover(active, view_size, locality, tile_cells=side, align=STEM_ALIGN, within=own)

    def begin(self, *, training: bool) -> None:
        """Before a step or a prediction: from here on it may take what was predicted, if tiles do not need more.

        Stores of predictions hand their memory on to each other, and to the next prediction: a step's peak is elsewhere.
        """
        self._pages.keep(not training)
        if self.device.type == "cpu":
            there_bytes = sum(int(p.grad.nbytes) for p in self.network.parameters() if p.grad is not None)
            self._room.begin(self.plan.predicted_peak_bytes - there_bytes)

    def make_room(self, needed_bytes: int) -> None:
        """Before so many bytes are taken: give freed memory back where the plan leaves less room than that.

        Tensors of other sizes, as of the next tile or stage, do not fit where the last ones were; in few large tiles, three times
        what they hold piled up.
        """
        if self.device.type == "cpu":
            self._room.make(needed_bytes)

    def open_store(self, number: int, input_size: Size) -> FeatureStore:
        """An empty store for x_k of an x_{k−1} (pixels for x_0) of ``input_size``."""
        part = self.network.stage(number) if number else self.network.stem
        return open_store(
            self.plan.store,
            part.locality.output_size(input_size),
            part.out_channels,
            dtype=torch.uint8 if self.quantized else self.plan.execution.store_dtype,
            device=self.device,
            folder=self.store_folder,
            pool=self._pages,
        )
