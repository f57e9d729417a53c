"""This library: the whole slide through a network of local stages, tile by tile."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from wholeslide.bench.flops import StepFlops
from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pipelines.pipeline import (
    CLASSES,
    CPU,
    PIXEL_MEAN,
    PIXEL_STD,
    Pipeline,
    Probabilities,
    open_tissue,
)
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import build_network
from wholeslide.model.quantization import Calibration
from wholeslide.slides.view import SlideView, make_view
from wholeslide.streaming.calibration import observe_slide
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine, read_ahead
from wholeslide.streaming.planner import make_plan
from wholeslide.verify import redraw_weights


class LocalPipeline(Pipeline):
    """Predicts as ``wholeslide predict`` does, with windows of pixels that are read on threads while others are computed.

    Raises:
        ConfigError: the processor has no such arithmetic.
    """

    def __init__(self, case: SpeedCase) -> None:
        self._case = case
        network = build_network(
            ModelConfig(
                backbone=case.backbone,
                stages=case.stages,
                weights="random",
                first_stride=case.first_stride,
                reconstruction=False,
            ),
            classes=CLASSES,
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
            seed=case.seed,
        )
        redraw_weights(network, case.seed)
        integers = case.dtype == "int8"
        config = StreamingConfig(precision="bf16" if integers else case.dtype)  # type: ignore[arg-type]
        self._engine = StreamingEngine(network, make_plan(network, case.size, config, CPU, training=False), CPU)
        self._view: SlideView | None = None
        if integers:  # the ranges are a run's, and found once
            calibration = Calibration(network)
            with closing(self._open()) as view:
                observe_slide(calibration, view)
            self._engine.multiply_integers(calibration)

    def warm_up(self) -> None:
        self._engine.warm_up()

    def predict(self) -> Probabilities:
        with closing(self._open()) as view:
            return self._final(view)

    def read(self) -> None:
        with closing(self._open()) as view:
            tiles = self._engine.runner.stem_tiles(view.size)
            for _ in read_ahead(view, tiles, view.background if self._engine.plan.elide else None):
                pass

    def load(self) -> None:
        self._view = self._open()
        self._view.prefetch(limit_bytes=3 * self._view.size.area)

    def compute(self) -> Probabilities:
        return self._final(self._loaded)

    def flops(self) -> int:
        return StepFlops(self._engine.network, self._loaded.size).forward()

    def facts(self) -> dict[str, Any]:
        plan = self._engine.plan
        return {
            "view_width": self._loaded.size.width,
            "view_height": self._loaded.size.height,
            "channels_last": plan.execution.channels_last,
            "store": plan.store,
            "tile_px": list(plan.tile_px),
        }

    def close(self) -> None:
        self._loaded.close()

    @property
    def _loaded(self) -> SlideView:
        assert self._view is not None, "nothing was loaded"
        return self._view

    def _final(self, view: SlideView) -> Probabilities:
        probabilities: Probabilities = self._engine.predict(view, classifiers=[self._case.stages])[-1]
        return probabilities

    def _open(self) -> SlideView:
        return make_view(open_tissue(self._case), padded_size=self._engine.network.padded_size)
