"""One row of ``bench memory``: a step in a fresh process, and what the system says of its memory."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import torch

from wholeslide.bench.memory import MemoryCase
from wholeslide.draws import Draws
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.view import make_view
from wholeslide.slides.working import open_working_slide
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import make_plan
from wholeslide.streaming.reference import WholeEngine
from wholeslide.streaming.stores import largest_store_bytes
from wholeslide.verify import redraw_weights

_SAMPLING_SECONDS = 0.02


def measure(case: MemoryCase) -> dict[str, Any]:
    """Forward and backward of one slide, with all gradients; optimiser state is only counted.

    ``peak_bytes`` is VmHWM, reset just before the step; ``baseline_bytes`` is VmRSS at that moment.
    """
    device = torch.device("cpu")
    network = build_network(
        ModelConfig(backbone=case.backbone, stages=case.stages, weights="random", reconstruction=case.rfr),
        classes=2,
        pixel_mean=(0.6, 0.6, 0.6),
        pixel_std=(0.15, 0.15, 0.15),
        seed=case.seed,
    )
    redraw_weights(network, case.seed)
    store = "host" if case.store == "none" else case.store
    config = StreamingConfig(memory=case.memory, store=store, precision=case.dtype)  # type: ignore[arg-type]
    plan = make_plan(network, Size(case.width, case.height), config, device)
    engine = _engine(network, plan, case.mode, device)
    slide = open_working_slide(Path(case.path), SlideConfig(mpp="native", background="keep"))
    view = make_view(slide, padded_size=network.padded_size)

    baseline_bytes = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with _AnonymousPeak() as anonymous:
        begun = time.perf_counter()
        engine.step(view, 1, Draws(case.seed, 0, "bench"))
        seconds = time.perf_counter() - begun
    trained = [p for p in network.parameters() if p.requires_grad]
    return {
        "dtype": plan.execution.precision,
        "channels_last": plan.execution.channels_last,
        "tile_px": list(plan.tile_px),
        "kept_px": list(plan.kept_px),
        "peak_bytes": _status_bytes("VmHWM"),
        "baseline_bytes": baseline_bytes,
        "anonymous_peak_bytes": anonymous.peak_bytes,
        "store_bytes": largest_store_bytes(network, plan.largest, plan.execution) if case.mode == "streamed" else 0,
        "optimizer_bytes": 2 * sum(p.numel() * p.element_size() for p in trained),
        "seconds": round(seconds, 3),
        "predicted_peak_bytes": baseline_bytes + plan.predicted_peak_bytes if case.mode == "streamed" else None,
        "gradient_norm": float(torch.stack([p.grad.double().norm() for p in trained if p.grad is not None]).norm()),
    }


def _engine(network: LocalNetwork, plan: Plan, mode: str, device: torch.device) -> StreamingEngine | WholeEngine:
    if mode == "whole":
        return WholeEngine(network, plan.execution, device)
    return StreamingEngine(network, plan, device)


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"no {key} in /proc/self/status"
    return int(match[1]) * 1024


class _AnonymousPeak:
    """The largest RssAnon, sampled on a thread: files that the system may drop are not in it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, _status_bytes("RssAnon"))
            self._done.wait(_SAMPLING_SECONDS)
