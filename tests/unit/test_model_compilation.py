"""Predictions with compiled stages, against those without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import build_network
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Precision
from wholeslide.streaming.planner import make_plan
from wholeslide.verify import redraw_weights

CPU, SIZE = torch.device("cpu"), Size(613, 517)


class View:
    """Noise, stored as bytes, with white glass at the right."""

    def __init__(self) -> None:
        self.size, self.background = SIZE, np.full(3, 255, np.uint8)
        self.pixels = np.random.default_rng(0).integers(0, 256, (SIZE.height, SIZE.width, 3), np.uint8)
        self.pixels[:, 300:] = 255

    def read(self, px_box: Box) -> np.ndarray:
        return self.pixels[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return bool((self.read(px_box) == 255).all())


def engine(precision: Precision) -> StreamingEngine:
    config = ModelConfig(backbone="resnet10t", stages=2, weights="random")
    network = build_network(config, classes=3, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)
    redraw_weights(network, 0)
    plan = make_plan(network, SIZE, StreamingConfig(tile=256, store="host", precision=precision), CPU, training=False)
    return StreamingEngine(network, plan, CPU)


def test_what_is_compiled_is_what_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is given every part, folded and cast; here it gives back what it got, and counts the calls."""
    called: list[nn.Module] = []

    def compile_nothing(module: nn.Module, **_: Any) -> Any:
        def call(x_bchw: torch.Tensor) -> torch.Tensor:
            called.append(module)
            output: torch.Tensor = module(x_bchw)
            return output

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    one = engine("bf16")
    expected = one.predict(View())
    one.compile()
    called.clear()
    np.testing.assert_allclose(one.predict(View()), expected, atol=2e-2)
    parts = list(dict.fromkeys(called))
    assert len(parts) == 3
    assert all(
        layer.weight.dtype == torch.bfloat16
        for part in parts
        for layer in part.modules()
        if isinstance(layer, nn.Conv2d)
    )
    assert not any(isinstance(layer, nn.BatchNorm2d) for part in parts for layer in part.modules())


def test_no_slide_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does it, what was compiled for equal sides takes no others, and what for few numbers does not take many."""
    made: dict[nn.Module, set[tuple[bool, bool]]] = {}

    def compile_nothing(module: nn.Module, **_: Any) -> Any:
        def call(x_bchw: torch.Tensor) -> torch.Tensor:
            square, many = x_bchw.shape[2] == x_bchw.shape[3], x_bchw.numel() > 20480
            kernels = made.setdefault(module, set())
            if not {(False, many), (square, many)} & kernels:
                kernels.add((square, many))
            output: torch.Tensor = module(x_bchw)
            return output

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    one = engine("fp32")
    one.compile()
    before = {module: set(kernels) for module, kernels in made.items()}
    assert len(before) == 3
    one.predict(View())
    assert made == before


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(module: nn.Module, **_: Any) -> Any:
        def call(x_bchw: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("\nno working C++ compiler was found\nmore of it")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    one = engine("fp32")
    with pytest.raises(
        ConfigError, match=r"no working C\+\+ compiler was found \(--compile\): leave it out, or install"
    ):
        one.compile()
    assert np.isfinite(one.predict(View())).all()  # as before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_predictions_are_the_same(precision: Precision) -> None:
    one = engine(precision)
    expected = one.predict(View())
    one.compile()
    np.testing.assert_allclose(one.predict(View()), expected, atol=1e-5 if precision == "fp32" else 2e-2)
