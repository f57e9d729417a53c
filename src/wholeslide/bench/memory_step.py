"""One row of ``bench memory``: a step in a fresh process, and what the system says of its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from wholeslide.allocator import return_freed_memory
from wholeslide.bench.flops import CountingRunner, StepFlops
from wholeslide.bench.memory import MemoryCase
from wholeslide.bench.process_memory import AnonymousPeak, reset_peak, status_bytes
from wholeslide.bench.texture import SQUARE_PX, Disc
from wholeslide.bench.whole_step import require_memory
from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.view import SlideView, make_view
from wholeslide.slides.working import open_working_slide
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import make_plan
from wholeslide.streaming.prediction import peak_bytes_on
from wholeslide.streaming.reference import WholeEngine
from wholeslide.streaming.timings import remembered_execution
from wholeslide.verify import redraw_weights

_CPU = torch.device("cpu")
#: Rows of the slide that are marked as varying at once.
_STRIP_PX = 512


def measure(case: MemoryCase) -> dict[str, Any]:
    """Forward and backward of one slide, with all gradients; optimiser state is only counted.

    ``peak_bytes`` is VmHWM, reset just before the step; ``baseline_bytes`` is VmRSS at that moment.

    Raises:
        WholeslideError: the network cannot be cut so, or the memory is not enough.
    """
    network = build_network(
        ModelConfig(backbone=case.backbone, stages=case.stages, weights="random", reconstruction=case.rfr),
        classes=2,
        pixel_mean=(0.6, 0.6, 0.6),
        pixel_std=(0.15, 0.15, 0.15),
        seed=case.seed,
    )
    redraw_weights(network, case.seed)
    view = _open_view(case, network)
    work = _whole(case, network, view.size) if case.mode == "whole" else _streamed(case, network, view)
    return_freed_memory()  # what timing and planning left behind would count as the baseline, and hide what the step takes
    baseline_bytes = status_bytes("VmRSS")
    reset_peak()
    with AnonymousPeak() as anonymous:
        begun = time.perf_counter()
        work.engine.step(view, 1, Draws(case.seed, 0, "bench"))
        seconds = time.perf_counter() - begun
    peak_bytes = status_bytes("VmHWM")
    trained = [p for p in network.parameters() if p.requires_grad]
    predicted_bytes = baseline_bytes + work.step_bytes if work.step_bytes is not None else None
    return {
        "view_width": view.size.width,
        "view_height": view.size.height,
        **work.choices,
        "mask_margin_cells": _mask_margin_cells(view, case.tissue_fraction),
        "peak_bytes": peak_bytes,
        "baseline_bytes": baseline_bytes,
        "anonymous_peak_bytes": anonymous.peak_bytes,
        "store_bytes": work.runner.largest_stored_bytes if work.runner is not None else 0,
        "optimizer_bytes": 2 * sum(p.numel() * p.element_size() for p in trained),
        "seconds": round(seconds, 3),
        "predicted_peak_bytes": predicted_bytes,
        "predicted_error": round(predicted_bytes / peak_bytes - 1, 4) if predicted_bytes is not None else None,
        "gradient_norm": float(torch.stack([p.grad.double().norm() for p in trained if p.grad is not None]).norm()),
        **_flops(case, network, view, work.runner),
    }


@dataclass(frozen=True)
class _Work:
    """What takes the step; a plan, a counting runner and the memory that is expected where it takes it tile by tile."""

    engine: StreamingEngine | WholeEngine
    execution: Execution
    plan: Plan | None = None
    runner: CountingRunner | None = None
    step_bytes: int | None = None

    @property
    def choices(self) -> dict[str, Any]:
        """What was left to the machine or to the plan."""
        return {
            "dtype": self.execution.precision,
            "channels_last": self.execution.channels_last,
            "tile_px": list(self.plan.tile_px) if self.plan is not None else None,
            "kept_px": list(self.plan.kept_px) if self.plan is not None else None,
        }


def _whole(case: MemoryCase, network: LocalNetwork, view_size: Size) -> _Work:
    execution, _ = remembered_execution(network, case.dtype, _CPU)  # type: ignore[arg-type]
    require_memory(network, execution, view_size)
    return _Work(WholeEngine(network, execution, _CPU), execution)


def _streamed(case: MemoryCase, network: LocalNetwork, view: SlideView) -> _Work:
    config = StreamingConfig(memory=case.memory, store=case.store, precision=case.dtype)  # type: ignore[arg-type]
    plan = make_plan(network, view.size, config, _CPU, over_baseline_bytes=case.over_baseline_bytes)
    folder = Path(case.store_dir) if case.store_dir is not None else None
    engine = StreamingEngine(network, plan, _CPU, store_folder=folder)
    step_bytes = peak_bytes_on(engine.runner, view.size, varying_of(view, case.tissue_fraction))
    engine.runner = runner = CountingRunner.like(engine.runner)
    return _Work(engine, plan.execution, plan, runner, step_bytes)


def _open_view(case: MemoryCase, network: LocalNetwork) -> SlideView:
    """The slide with its white masked, and cropped to its tissue where that is asked for."""
    background = "keep" if case.tissue_fraction == 1 else "constant"
    slide = open_working_slide(Path(case.path), SlideConfig(mpp="native", background=background))  # type: ignore[arg-type]
    if not case.crop:
        slide.whole_box = Box.covering(slide.whole_size)
    return make_view(slide, padded_size=network.padded_size)


def _mask_margin_cells(view: SlideView, fraction: float) -> int | None:
    """By how many cells the tissue that was found reaches over the disc; nothing where no tissue was looked for."""
    mask = view.slide.mask
    if fraction == 1:
        return None
    disc, side = Disc.covering(mask.size, fraction), mask.px_per_cell
    wanted = np.concatenate([_cells_of(disc.pixels(strip), side) for strip in _strips(mask.size, side * SQUARE_PX)])
    assert not (wanted & ~mask.cells).any(), "the mask cuts off a part of the disc"
    away = ndimage.distance_transform_cdt(~wanted, metric="chessboard")
    return int(away[mask.cells].max())


def _cells_of(pixels: npt.NDArray[np.bool_], side: int) -> npt.NDArray[np.bool_]:
    """Whether any pixel of each cell is true."""
    rows, columns = (np.arange(0, length, side) for length in pixels.shape)
    cells: npt.NDArray[np.bool_] = np.logical_or.reduceat(np.logical_or.reduceat(pixels, rows, axis=0), columns, axis=1)
    return cells


def _strips(size: Size, height: int) -> list[Box]:
    return [Box(0, top, size.width, min(height, size.height - top)) for top in range(0, size.height, height)]


def _flops(case: MemoryCase, network: LocalNetwork, view: SlideView, runner: CountingRunner | None) -> dict[str, Any]:
    counts = StepFlops(network, view.size)
    dense = counts.dense()
    return {
        "dense_flops": dense,
        "active_flops": counts.active(varying_of(view, case.tissue_fraction)),
        "computed_flops": counts.computed(runner) if runner is not None else dense,
    }


def varying_of(view: SlideView, fraction: float) -> VaryingPixels:
    """Where the view is not white, told from the disc."""
    if fraction == 1:
        return VaryingPixels(view.size, everywhere=True)
    varying, whole_box = VaryingPixels(view.size), view.slide.whole_box
    disc = Disc.covering(view.slide.whole_size, fraction)
    for strip in _strips(disc.size, _STRIP_PX):
        inside = strip.intersection(whole_box)
        if not inside.empty:
            pixels = disc.pixels(strip)[inside.relative_to(strip).rows_columns]
            varying.note(inside.relative_to(whole_box), pixels[..., None].astype(np.float32), np.zeros(1, np.float32))
    return varying
