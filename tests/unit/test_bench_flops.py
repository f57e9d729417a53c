"""Counting a step's arithmetic: by hand on a tiny network, and against what torch itself counts while a step runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from wholeslide.bench.flops import CountingRunner, StepFlops, multiplications
from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.heads import AttentionClassifier
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.stages import Stage
from wholeslide.streaming.background import VaryingPixels
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.reference import WholeEngine

CPU, DRAWS, FP32 = torch.device("cpu"), Draws(0, 0, "flops"), Execution("fp32", channels_last=True)
#: The norm of the classifier's grid is a matrix product for torch, and none for us.
CLOSE = 1e-4


def stage_of(*layers: nn.Module, channels: tuple[int, int], input_stride: int) -> Stage:
    body = fx.symbolic_trace(nn.Sequential(*layers))
    return Stage(body, name="tiny", in_channels=channels[0], out_channels=channels[1], input_stride=input_stride)


@pytest.fixture(scope="module")
def tiny() -> LocalNetwork:
    """A stem of stride 2 and one stage of two convolutions: small enough to count by hand."""
    stem = stage_of(nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), channels=(3, 2), input_stride=1)
    stage = stage_of(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False), channels=(2, 3), input_stride=2
    )
    head = AttentionClassifier(3, kernel=2, attention_hidden=2, hidden=4, classes=2, dropout=0.0)
    config = ModelConfig(stages=1, reconstruction=False)
    return LocalNetwork(stem, [stage], [head], [], pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, config=config)


def classifier(rows: int) -> int:
    """Attention's branches and score, pooling, the two layers behind: forward, and backward at twice the cost."""
    return 3 * 2 * (rows * (3 * 2 + 3 * 2 + 2 + 3) + 3 * 4 + 4 * 2)


def test_a_dense_step_by_hand(tiny: LocalNetwork) -> None:
    """16×12 pixels are 48 cells of x_0 and x_1, and 12 of z."""
    stem = 48 * 2 * (2 * 3 * 9)  # frozen: forward only
    first = 48 * 2 * (3 * 2 * 9) * 2  # no gradient of the stage's input
    second = 48 * 2 * (3 * 3) * 3
    grid = 12 * 2 * (3 * 3 * 4) * 3
    assert StepFlops(tiny, Size(16, 12)).dense() == stem + first + second + grid + classifier(12)


def test_the_active_cells_by_hand(tiny: LocalNetwork) -> None:
    """One block of 32×32 pixels varies on 128×128; the border of x_0 at the left and top, of x_1 on all sides, does too."""
    varying = VaryingPixels(Size(128, 128))
    varying.note(Box(32, 32, 32, 32), np.ones((32, 32, 1), np.float32), np.zeros(1, np.float32))
    stem_cells = 17**2 + (64**2 - 63**2)  # j with 2j − 1 … 2j + 1 in 32 … 63: 16 to 32; j = 0 sees the border
    stage_cells = 19**2 + (64**2 - 61**2)  # 2j − 3 … 2j + 3: 15 to 33; 0, 1 and 63
    grid_cells = 10**2 + (32**2 - 30**2)  # 4j − 3 … 4j + 5: 7 to 16; 0 and 31
    stem, first, second, grid = 2 * 54, 2 * 54 * 2, 2 * 9 * 3, 2 * 36 * 3
    lone = 4 * stem + 16 * (first + second) + grid  # of 2×2 cells of x_0, 4×4 of x_1 with their halo, 1 of z
    expected = stem_cells * stem + stage_cells * (first + second) + grid_cells * grid + classifier(grid_cells + 1)
    counts = StepFlops(tiny, Size(128, 128))
    assert counts.active(varying) == expected + lone
    assert counts.active(VaryingPixels(Size(128, 128), everywhere=True)) == counts.dense()


class Painted:
    """Noise on a white slide."""

    background = np.ones(3, np.float32)

    def __init__(self, size: Size, tissue: Box | None = None) -> None:
        self.size = size
        noise = np.random.default_rng(0).random((size.height, size.width, 3), dtype=np.float32)
        self.pixels_hwc = noise if tissue is None else np.ones_like(noise)
        if tissue is not None:
            self.pixels_hwc[tissue.rows_columns] = noise[tissue.rows_columns]

    def read(self, px_box: Box) -> np.ndarray:
        return self.pixels_hwc[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return False


class TorchsCount(TorchDispatchMode):
    """What torch's own formulas say of every operation that runs; its ``FlopCounterMode`` stumbles over a gradient within one."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def counted(step: Any) -> int:
    with TorchsCount() as mode:
        step()
    return int(mode.flops)


def build(backbone: str, stages: int) -> LocalNetwork:
    config = ModelConfig(backbone=backbone, stages=stages, weights="random", reconstruction_region_px=160)
    return build_network(config, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.2,) * 3, seed=0)


@pytest.mark.parametrize(("backbone", "stages"), [("test_resnet", 1), ("test_resnet", 2), ("resnet10t", 3)])
def test_a_dense_step_is_what_torch_counts(backbone: str, stages: int) -> None:
    network = build(backbone, stages)
    view = Painted(network.padded_size(Size(501, 417)))
    found = counted(lambda: WholeEngine(network, FP32, CPU).step(view, 1, DRAWS))
    assert math.isclose(StepFlops(network, view.size).dense(), found, rel_tol=CLOSE)


@pytest.mark.parametrize("tissue", [None, Box(500, 300, 250, 200)], ids=["everywhere", "elided"])
@pytest.mark.parametrize("kept_px", [0, 200_000], ids=["recomputed", "partly kept"])
def test_the_tiles_of_a_step_are_what_torch_counts(kept_px: int, tissue: Box | None) -> None:
    network = build("test_resnet", 2)
    view = Painted(network.padded_size(Size(1201, 907)), tissue)
    plan = Plan(FP32, "host", (200,) * 3, (kept_px,) * 3, largest=view.size)
    engine = StreamingEngine(network, plan, CPU)
    engine.runner = runner = CountingRunner.like(engine.runner)
    found = counted(lambda: engine.step(view, 1, DRAWS))
    counts = StepFlops(network, view.size)
    assert math.isclose(counts.computed(runner), found, rel_tol=CLOSE)
    if tissue is None:
        assert counts.computed(runner) > counts.dense()


def test_stores_are_measured_where_they_are_largest() -> None:
    network, size = build("test_resnet", 2), Size(601, 507)
    engine = StreamingEngine(network, Plan(FP32, "host", (200,) * 3, (0,) * 3, largest=size), CPU)
    engine.runner = runner = CountingRunner.like(engine.runner)
    engine.step(Painted(size), 1, DRAWS)
    parts = [(network.stem, 0), (network.stage(1), 1)]
    expected = sum(4 * part.out_channels * network.feature_size(size, number).area for part, number in parts)
    assert runner.largest_stored_bytes == expected


@pytest.mark.parametrize("backbone", ["mobilenetv2_035", "test_convnext", "regnetx_002"])
def test_grouped_convolutions_and_linear_layers(backbone: str) -> None:
    """Forward only: torch counts the backward pass of a grouped convolution as if it were not grouped."""
    network = build(backbone, 2)
    cells = Size(48, 32)
    x_bchw = torch.zeros((1, network.stage(1).in_channels, cells.height, cells.width))

    def forward() -> Tensor:
        with torch.no_grad():
            return network.stage(1)(x_bchw)

    layers = multiplications(network.stage(1), trained=True)
    expected = sum(layer.flops * layer.locality.output_size(cells).area for layer in layers)
    assert expected == counted(forward)
    assert layers[0].backward in (1, 2)
    assert {layer.backward for layer in layers[2:]} <= {1, 2}
    assert not any(layer.backward for layer in multiplications(network.stem, trained=False))
