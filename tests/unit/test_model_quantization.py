"""Stages in 8-bit integers, against the same stages in fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.quantization import Calibration, stored_pixels
from wholeslide.streaming.calibration import observe_slide
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.planner import make_plan
from wholeslide.streaming.stores import FeatureStore
from wholeslide.verify import redraw_weights

CPU, SIZE, WHITE = torch.device("cpu"), Size(700, 620), np.ones(3, np.float32)


class View:
    """Smooth noise in a box, and white around it."""

    def __init__(self, tissue: Box) -> None:
        self.size, self.background = SIZE, WHITE
        self.pixels = np.ones((SIZE.height, SIZE.width, 3), np.float32)
        noise = np.random.default_rng(0).random((tissue.height // 4, tissue.width // 4, 3)).repeat(4, 0).repeat(4, 1)
        self.pixels[tissue.rows_columns] = noise.astype(np.float32)

    def read(self, px_box: Box) -> np.ndarray:
        return self.pixels[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return bool((self.read(px_box) == WHITE).all())


@pytest.fixture(scope="module")
def network() -> LocalNetwork:
    config = ModelConfig(backbone="resnet18", stages=4, weights="random")
    network = build_network(config, classes=3, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)
    redraw_weights(network, 0)
    return network


@pytest.fixture(scope="module")
def calibration(network: LocalNetwork) -> Calibration:
    found = Calibration(network)
    observe_slide(found, View(Box(0, 0, 700, 620)))
    return found


def engine(network: LocalNetwork, *, tile: int, elide: bool = True) -> StreamingEngine:
    plan = make_plan(network, SIZE, StreamingConfig(tile=tile, store="host", precision="fp32"), CPU, training=False)
    return StreamingEngine(network, replace(plan, elide=elide), CPU)


def test_integers_change_little_and_something(network: LocalNetwork, calibration: Calibration) -> None:
    view, exact, fast = View(Box(0, 0, 700, 620)), engine(network, tile=700), engine(network, tile=700)
    fast.multiply_integers(calibration)
    in_floats, in_integers = exact.predict(view), fast.predict(view)
    assert 0 < np.abs(in_floats - in_integers).max() < 0.05
    np.testing.assert_allclose(in_integers.sum(axis=1), 1)


def test_a_part_s_error_is_that_of_eight_bits(network: LocalNetwork, calibration: Calibration) -> None:
    pixels = View(Box(0, 0, 700, 620)).read(Box(0, 0, 384, 384))
    stem, *stages = calibration.quantized()
    with torch.no_grad():
        expected, found = network.stem.body(network.to_input(pixels)), stem(stored_pixels(pixels))
        assert 0 < distance(stem.real(found), expected) < 0.03
        for number, stage in enumerate(stages, start=1):
            expected, found = network.stage(number)(expected), stage(found)
            assert 0 < distance(stage.real(found), expected) < 0.06, number
            assert found.dtype == (torch.float32 if number == len(stages) else torch.uint8)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("tissue", [Box(0, 0, 700, 620), Box(200, 190, 160, 180)])
def test_tiles_and_elision_change_nothing(network: LocalNetwork, calibration: Calibration, tissue: Box) -> None:
    """Integers are added exactly, whatever the window: what is left is the rounding of the fp32 grid."""
    view = View(tissue)
    found = []
    for one in (engine(network, tile=700, elide=False), engine(network, tile=150), engine(network, tile=330)):
        one.multiply_integers(calibration)
        found.append(one.predict(view))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_ranges_that_were_kept_give_the_same_integers(network: LocalNetwork, calibration: Calibration) -> None:
    again = Calibration(network)
    again.load_state(calibration.state())
    pixels_bchw = stored_pixels(np.random.default_rng(0).random((160, 160, 3)))
    (stem, first, *_), (other_stem, other_first, *_) = calibration.quantized(), again.quantized()
    assert torch.equal(first(stem(pixels_bchw)), other_first(other_stem(pixels_bchw)))
    assert again.sha256 == calibration.sha256
    again.load_state({name: torch.nextafter(found, found + 1) for name, found in calibration.state().items()})
    assert again.sha256 != calibration.sha256
    with pytest.raises(KeyError):
        again.load_state({"1.of_another_network": torch.zeros(2)})


@pytest.mark.parametrize("store", ["host", "disk"])
def test_features_are_kept_in_a_byte_each(
    network: LocalNetwork, calibration: Calibration, store: Literal["host", "disk"]
) -> None:
    plan = make_plan(network, SIZE, StreamingConfig(tile=330, store=store, precision="bf16"), CPU, training=False)
    one = StreamingEngine(network, plan, CPU)
    one.multiply_integers(calibration)
    stored = []

    def observe(number: int, x: FeatureStore | None, grid: object) -> None:
        if x is not None:
            stored.append((x.nbytes, x.size.area * x.channels))

    probabilities = one.predict(View(Box(0, 0, 700, 620)), observer=observe)
    assert len(stored) == network.depth - 1
    assert all(found == expected for found, expected in stored)
    in_floats = engine(network, tile=700).predict(View(Box(0, 0, 700, 620)))
    np.testing.assert_allclose(probabilities, in_floats, atol=0.05)


def test_training_goes_on_in_floats(network: LocalNetwork, calibration: Calibration) -> None:
    losses = []
    for integers in (False, True):
        one = engine(network, tile=330)
        if integers:
            one.multiply_integers(calibration)
        losses.append(
            one.step(View(Box(0, 0, 700, 620)), 0, Draws(seed=0, epoch=0, slide="slide")).classification_losses
        )
        network.zero_grad()
    assert losses[0] == losses[1]


def test_the_network_is_not_changed(network: LocalNetwork, calibration: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calibration.quantized()
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_processor_without_such_instructions_is_told(network: LocalNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ConfigError, match=r"no instructions.*--precision int8.*bf16"):
        Calibration(network)
