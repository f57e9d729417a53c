"""What a step on a view with background is expected to hold, against what it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.costs import gradient_bytes
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.needs import StageNeeds
from wholeslide.streaming.planner import make_plan
from wholeslide.streaming.prediction import peak_bytes_on
from wholeslide.streaming.stage_pass import StageStep

CPU, SIZE, WHITE = torch.device("cpu"), Size(1500, 1200), np.ones(3, np.float32)


@pytest.fixture(scope="module")
def network() -> LocalNetwork:
    config = ModelConfig(backbone="resnet18", stages=4, weights="random")
    return build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)


class View:
    """Noise in a box, and white around it."""

    def __init__(self, tissue: Box) -> None:
        self.size, self.background = SIZE, WHITE
        self.pixels = np.ones((SIZE.height, SIZE.width, 3), np.float32)
        noise = np.random.default_rng(0).random((tissue.height, tissue.width, 3))
        self.pixels[tissue.rows_columns] = noise.astype(np.float32)

    def read(self, px_box: Box) -> np.ndarray:
        return self.pixels[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return False

    @property
    def varying(self) -> VaryingPixels:
        varying = VaryingPixels(self.size)
        varying.note(Box.covering(self.size), self.pixels, WHITE)
        return varying


def _engine(network: LocalNetwork, **choices: Any) -> StreamingEngine:
    config = StreamingConfig(**{"memory": "8GiB", "precision": "fp32", "tile": 300, "store": "host", **choices})
    plan = make_plan(network, SIZE, config, CPU)
    return StreamingEngine(network, replace(plan, kept_px=(0, *[600_000] * network.depth)), CPU)


def test_without_background_it_is_the_plans_but_for_gradients_to_come(network: LocalNetwork) -> None:
    engine = _engine(network)
    everywhere = VaryingPixels(SIZE, everywhere=True)
    expected = peak_bytes_on(engine.runner, SIZE, everywhere)
    to_come = gradient_bytes(network) - gradient_bytes(network, through=1)
    of_plan = max(stage.peak_bytes(c) for stage, c in zip(engine.plan.needs, engine.plan.choices, strict=True))
    assert 0.95 * (of_plan - to_come) <= expected <= of_plan
    not_elided = StreamingEngine(network, replace(engine.plan, elide=False), CPU)
    half = View(Box(0, 0, 500, 500)).varying
    assert peak_bytes_on(not_elided.runner, SIZE, half) == expected


def test_gradients_are_there_once_the_stages_are_through(network: LocalNetwork) -> None:
    through = [gradient_bytes(network, through=number) for number in range(network.depth + 1)]
    assert through[0] == 0
    assert sorted(set(through)) == through
    assert through[-1] == gradient_bytes(network)


def test_the_less_tissue_the_less_memory(network: LocalNetwork) -> None:
    engine = _engine(network)
    tissues = [Box(400, 300, 100, 100), Box(400, 300, 600, 600), Box(0, 0, SIZE.width, SIZE.height)]
    peaks = [peak_bytes_on(engine.runner, SIZE, View(tissue).varying) for tissue in tissues]
    assert peaks[0] < peaks[1] < peaks[2]


def test_windows_and_features_are_those_of_the_step(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest window, what is kept, and the features of each stage, noted while a step runs."""
    engine, view = _engine(network), View(Box(400, 300, 300, 250))
    share_out, bytes_of = StageStep._share_out, StageNeeds.bytes_of
    windows, stored, expected = list[tuple[int, int]](), list[int](), list[tuple[int, int]]()
    expected_stores: list[int] = []

    def noted(self: StageStep) -> Any:
        recomputed, kept = share_out(self)
        number = self._objective.number
        px = {id(tile): engine.runner.window_px(number, tile) for tile in (*recomputed, *kept)}
        windows.append((max(px[id(tile)] for tile in (*recomputed, *kept)), sum(px[id(tile)] for tile in kept)))
        stored.append(self._work.x_previous.nbytes)
        return recomputed, kept

    def predicted(self: StageNeeds, window_px: int, kept_px: int) -> int:
        expected.append((window_px, kept_px))
        expected_stores.append(self.stores_bytes)
        return bytes_of(self, window_px, kept_px)

    monkeypatch.setattr(StageStep, "_share_out", noted)
    engine.step(view, 1, Draws(0, 0, "a"))
    monkeypatch.setattr(StageNeeds, "bytes_of", predicted)
    peak_bytes_on(engine.runner, SIZE, view.varying)
    assert expected[1:] == windows  # the first is the stem's
    assert any(kept > 0 for _, kept in windows)
    both = [before + after for before, after in zip(stored, [*stored[1:], 0], strict=True)]
    assert expected_stores[1:] == pytest.approx(both, rel=1e-6)
