"""Pixels are read ahead, on threads that end with the step, and not where they are known."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from wholeslide.draws import Draws
from wholeslide.errors import ConfigError, Problem, SlideError
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import build_network
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.tile_runner import TileRunner

SIZE = Size(600, 400)
WHITE = np.ones(3, np.float32)


class View:
    """Noise left of ``white_from``, white from there on. Reads are counted, and fail from the ``fails_at``-th on."""

    def __init__(self, white_from: int = 600, fails_at: int = 1000) -> None:
        self.size, self.background = SIZE, WHITE
        self.pixels = np.random.default_rng(0).random((SIZE.height, SIZE.width, 3)).astype(np.float32)
        self.pixels[:, white_from:] = 1
        self.white_from, self.fails_at, self.read_boxes = white_from, fails_at, list[Box]()

    def read(self, px_box: Box) -> np.ndarray:
        self.read_boxes.append(px_box)
        if len(self.read_boxes) >= self.fails_at:
            raise SlideError([Problem("cannot be decoded", "a.svs", "leave it out")])
        return self.pixels[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return px_box.left >= self.white_from


@pytest.fixture(scope="module")
def engine() -> StreamingEngine:
    config = ModelConfig(backbone="resnet18", stages=2, weights="random", reconstruction=False)
    network = build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)
    plan = Plan(Execution("fp32", True), "host", (96,) * 3, (0,) * 3, SIZE)
    return StreamingEngine(network, plan, torch.device("cpu"))


def test_an_error_of_a_thread_is_the_steps_own_and_the_threads_end(engine: StreamingEngine) -> None:
    before = threading.active_count()
    with pytest.raises(SlideError, match="cannot be decoded"):
        engine.step(View(fails_at=5), 1, Draws(0, 0, "a"))
    assert threading.active_count() == before


def test_no_more_than_two_windows_are_read_ahead(engine: StreamingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    view, computed, ahead = View(), [0], list[int]()
    run = TileRunner.run

    def counted(self: TileRunner, *arguments: object) -> torch.Tensor:
        computed[0] += 1
        ahead.append(len(view.read_boxes) - computed[0])
        return run(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TileRunner, "run", counted)
    engine._stem(engine.runner, view)
    assert computed[0] == len(view.read_boxes) > 10
    assert max(ahead) <= 2


def test_known_background_is_not_read(engine: StreamingEngine) -> None:
    view = View(white_from=200)
    half_known = engine.predict(view)
    assert view.read_boxes
    assert not any(view.is_background(box) for box in view.read_boxes)
    view.is_background = lambda _box: False  # type: ignore[method-assign]
    np.testing.assert_allclose(half_known, engine.predict(view), rtol=1e-6)


class SlowView(View):
    """A disk that takes its time."""

    def read(self, px_box: Box) -> np.ndarray:
        time.sleep(0.05)
        return super().read(px_box)


def test_the_wait_for_pixels_is_told(engine: StreamingEngine) -> None:
    engine.predict(View())
    quick_seconds = engine.waited_seconds
    view = SlowView()
    engine.predict(view, classifiers=[1])
    reading_seconds = 0.05 * len(view.read_boxes)
    # two threads read while one window is computed, and the first is waited for at least
    assert max(quick_seconds, 0.05) < engine.waited_seconds < reading_seconds


def test_classifiers_that_are_not_asked_have_no_answer(engine: StreamingEngine) -> None:
    all_of_them = engine.predict(View())
    for asked in ([1], [2]):
        rows = engine.predict(View(), classifiers=asked)
        assert np.isnan(rows).any(axis=1).tolist() == [number not in asked for number in (1, 2)]
        np.testing.assert_array_equal(rows[asked[0] - 1], all_of_them[asked[0] - 1])
    with pytest.raises(ConfigError, match="no such choice"):
        engine.predict(View(), classifiers=[3])
