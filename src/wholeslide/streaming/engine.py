"""Exact training and inference of a whole slide, tile by tile.

A stage is local, so each of its tiles needs only a window of the stage's input. A step takes two passes over a stage's tiles.
The first, without gradients, writes x_k into a store and z, the coarse grid that the classifier works on. The loss on the
whole grid then gives the gradient of every cell of z, and the decoder that of a few regions of x_k. The second pass
recomputes each tile with gradients, but for those whose graphs the plan has room to keep, and sends both back into the stage's
weights. No gradient with respect to a stage's input is ever needed, because stages are isolated.

Where the slide is background, and nothing else within a cell's reach, all cells are one vector: a lone tile computes it once, and
the sum of what those cells should send back goes back through it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from wholeslide.allocator import fix_thresholds
from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box
from wholeslide.model.compilation import compiled_parts
from wholeslide.model.network import LocalNetwork
from wholeslide.model.quantization import Calibration
from wholeslide.streaming.background import Pixels, PixelSource, VaryingPixels
from wholeslide.streaming.disk_store import folder_for_features
from wholeslide.streaming.grid import ROWS_OF_A_PART
from wholeslide.streaming.heat import StageHeat, stage_heat
from wholeslide.streaming.objective import StageObjective
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.stage_pass import StagePass, StageStep
from wholeslide.streaming.step import Observer, StepResult, chosen_stages
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tile_runner import TileRunner
from wholeslide.streaming.tiles import Tile, lone_tile

#: Windows of pixels that are read, each on a thread of its own, while one is computed.
_WINDOWS_AHEAD = 2


class StreamingEngine:
    """Runs a network over slides of any size in the memory that a plan allows.

    ``waited_seconds`` tells how long the last step or prediction stood still for pixels.

    Args:
        network: moved to ``device`` and to the plan's parameter type in place.
        plan: tile sizes, precision, layout and store.
        device: where tiles are computed.
        store_folder: where features are kept if the plan wants them on disk; by default with other temporary files.

    Raises:
        ConfigError: features are to be kept on disk, and the folder does not serve.
    """

    def __init__(
        self, network: LocalNetwork, plan: Plan, device: torch.device, *, store_folder: Path | None = None
    ) -> None:
        fix_thresholds()
        self.network = plan.execution.arrange_parameters(
            network.to(device=device, dtype=plan.execution.parameter_dtype)
        )
        self.network.train()
        self.plan, self.device = plan, device
        folder = folder_for_features(store_folder) if plan.store == "disk" else None
        self.runner = TileRunner(self.network, plan, device, folder)
        self._predictor = self.runner
        self.waited_seconds = 0.0

    def go_on_with(self, plan: Plan) -> None:
        """Take other tiles from now on; arithmetic and store stay."""
        assert (plan.execution, plan.store) == (self.plan.execution, self.plan.store)
        self.plan, self.runner = plan, replace(self.runner, plan=plan)
        self._predictor = replace(self._predictor, plan=plan)

    def multiply_integers(self, calibration: Calibration) -> None:
        """Predict with 8-bit integers from now on; training is not touched.

        Raises:
            ConfigError: the device is no CPU.
        """
        if self.device.type != "cpu":
            what, remedy = "8-bit integers multiply on a CPU only", "leave it out, or give --precision bf16"
            raise ConfigError.single(what, where="--precision int8", remedy=remedy)
        self._predictor = replace(self.runner, quantized=calibration.quantized())

    def compile(self) -> None:
        """Predict with stages that ``torch.compile`` makes now, which takes a minute or more; training is not touched.

        Each is given windows as the plan has them, so that none is compiled again while a slide waits.

        Raises:
            ConfigError: torch has no way to compile for this device.
        """
        runner = replace(self.runner, compiled=compiled_parts(self.network, self.plan.execution.multiplied_dtype))
        try:
            runner.run_examples()
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            remedy = "leave it out, or install what it needs: on a CPU, a C++ compiler"
            raise ConfigError.single(f"torch.compile failed: {reason}", where="--compile", remedy=remedy) from error
        self._predictor = runner

    def warm_up(self) -> None:
        """Compute a few tiles of every stage: what libraries make at a first call is then there before the first slide."""
        self._predictor.run_examples()

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
        trained = chosen_stages(self.network, stages)
        classification, reconstruction = [math.nan] * depth, [math.nan] * depth
        probabilities: list[np.ndarray | None] = [None] * depth
        self.runner.begin(training=True)
        x, varying = self._stem(self.runner, view)
        for number in range(1, max(trained) + 1):
            if number in trained:
                objective = StageObjective(self.network, number, label, draws, view.size)
                work = StageStep(self.runner, objective, x, varying, weight)
                x_next = work.run(observer)
                classification[number - 1] = work.classification_loss
                reconstruction[number - 1] = work.reconstruction_loss
                probabilities[number - 1] = work.probabilities
                del work  # its weights and gradients, before the next stage makes its own
            else:
                x_next = _forward(self.runner, number, x, varying, needs_grid=False).x
            x.close()
            x = x_next if x_next is not None else x
        x.close()
        classes = next(p for p in probabilities if p is not None).size
        rows = [np.full(classes, math.nan) if row is None else row for row in probabilities]
        return StepResult(classification, reconstruction, np.stack(rows))

    @torch.inference_mode()
    def predict(
        self, view: PixelSource, *, observer: Observer | None = None, classifiers: Collection[int] | None = None
    ) -> np.ndarray:
        """Class probabilities of every stage's classifier, (K, classes) float64; the last row is the final classifier's.

        Args:
            view: the slide.
            observer: sees each stage's features, as they are stored, and its grid.
            classifiers: numbers of the stages whose classifiers are asked, counted from 1; the others' rows are NaN. All by
                default. Stages behind the last of them are not run.

        Raises:
            ConfigError: the view has not the size that the network pads to.
            SlideError: the slide could not be read.
        """
        asked = chosen_stages(self.network, classifiers)
        rows = np.full((self.network.depth, self.network.head(self.network.depth).logits.out_features), math.nan)
        self._predictor.begin(training=False)
        x, varying = self._stem(self._predictor, view)
        for number in range(1, max(asked) + 1):
            work = _forward(self._predictor, number, x, varying, needs_grid=number in asked)
            x.close()
            if number in asked:
                if observer is not None:
                    observer(number, work.x, work.layout.whole(work.z_nc))
                z_parts = torch.split(work.z_nc, ROWS_OF_A_PART)
                logits = self.network.head(number)(z_parts, work.layout.counts(work.z_nc)).logits
                rows[number - 1] = torch.softmax(logits.double(), dim=0).cpu().numpy()
                del z_parts
            x = work.x if work.x is not None else x
            del work  # before the next stage makes its own weights and grid
        x.close()
        return rows

    def explain(self, view: PixelSource) -> Iterator[StageHeat]:
        """What each stage's classifier looked at, stage after stage, in the arithmetic of training.

        Args:
            view: the slide; it stays open until the last stage has been given.

        Raises:
            ConfigError: the view has not the size that the network pads to.
            SlideError: the slide could not be read.
        """
        runner, network = self.runner, self.network
        runner.begin(training=False)
        x, varying = self._stem(runner, view)
        try:
            for number in range(1, network.depth + 1):
                work = _forward(runner, number, x, varying, needs_grid=True, keeps_last=True)
                x.close()
                assert work.x is not None
                x = work.x
                yield stage_heat(work, stride_px=network.stage(number).stride, number=number)
                del work  # before the next stage makes its own weights and grid
        finally:
            x.close()

    @torch.no_grad()
    def _stem(self, runner: TileRunner, view: PixelSource) -> tuple[FeatureStore, VaryingPixels]:
        """x_0, pixels through the frozen stem; and where the pixels are not all background."""
        needed = self.network.padded_size(view.size)
        if needed != view.size:
            raise ConfigError.single(
                "not a size that the network divides",
                where=f"view of {view.size} pixels",
                remedy=f"pad it with background to network.padded_size(view.size), which is {needed}",
            )
        background = view.background if self.plan.elide else None
        varying = VaryingPixels(view.size, everywhere=background is None)
        x = runner.open_store(0, view.size)
        weights = runner.step_weights(0, trained=False)
        tiles = runner.stem_tiles(view.size)
        self.waited_seconds = 0.0
        for tile, pixels_hwc in zip(tiles, read_ahead(view, tiles, background, self._wait), strict=True):
            window = tile.cell_window
            if pixels_hwc is None:
                assert background is not None
                pixels_hwc = np.broadcast_to(background, (window.height, window.width, 3))
            elif background is not None:
                varying.note(window, pixels_hwc, background)
            runner.make_room(self.plan.tile_bytes(0))
            for part in runner.needed_of_stem(tile, view.size, varying):
                part_hwc = pixels_hwc[part.cell_window.relative_to(window).rows_columns]
                x.write(part.cell_own, runner.run(weights, runner.to_input(part_hwc), part))
        if background is not None and varying.anywhere_constant:
            lone = lone_tile(self.network.stem.locality, align=1)
            pixels_hwc = np.broadcast_to(background, (lone.cell_window.height, lone.cell_window.width, 3))
            x.constant_c = runner.run(weights, runner.to_input(pixels_hwc), lone)[0, :, 0, 0].clone()
        return x, varying

    def _wait(self, seconds: float) -> None:
        self.waited_seconds += seconds


def _forward(
    runner: TileRunner,
    number: int,
    x_previous: FeatureStore,
    varying: VaryingPixels,
    *,
    needs_grid: bool,
    keeps_last: bool = False,
) -> StagePass:
    """x_k and, where asked for, z, without gradients; the last stage's x_k is kept where asked for."""
    work = StagePass(runner, number, x_previous, varying, trained=False, needs_grid=needs_grid, keeps_last=keeps_last)
    with torch.no_grad():
        for tile, own_bchw in work.run(work.everything):
            work.keep(tile, own_bchw, work.grid(own_bchw) if needs_grid else None)
    return work


def read_ahead(
    view: PixelSource,
    tiles: Sequence[Tile],
    background: Pixels | None,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[Pixels | None]:
    """The pixels of each tile's window, (h, w, 3), the next ones read while one is computed.

    Nothing for a window that is known to be all ``background``: it is not read. ``on_wait`` is told the seconds for which each
    window was waited for.
    """

    def pixels(window: Box) -> Pixels | None:
        return None if background is not None and view.is_background(window) else view.read(window)

    def taken(read: Future[Pixels | None]) -> Pixels | None:
        begun = time.perf_counter()
        window_hwc = read.result()
        if on_wait is not None:
            on_wait(time.perf_counter() - begun)
        return window_hwc

    with ThreadPoolExecutor(max_workers=_WINDOWS_AHEAD, thread_name_prefix="pixels") as threads:
        pending: deque[Future[Pixels | None]] = deque()
        for tile in tiles:
            pending.append(threads.submit(pixels, tile.cell_window))
            if len(pending) > _WINDOWS_AHEAD:
                yield taken(pending.popleft())
        while pending:
            yield taken(pending.popleft())
