"""Small networks, slides and the comparison that the exactness tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from oracle import OracleStep
from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.locality import AxisLocality, Locality
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.stages import Stage
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Execution, Precision
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.reference import WholeEngine
from wholeslide.streaming.step import StepResult
from wholeslide.streaming.stores import StorePlace

CPU = torch.device("cpu")
DRAWS = Draws(seed=5, epoch=1, slide="a.svs")
Side = Literal["left", "right", "top", "bottom"]
SIDES: tuple[Side, ...] = ("left", "right", "top", "bottom")

#: A gradient smaller than this share of the largest is rounding about zero.
_VANISHING = 1e-12


@register_model
def resnet_tiny(**kwargs: Any) -> ResNet:
    """Eight blocks of few channels; a deep stem, average pooling with ceil_mode on the shortcuts, as in ResNet-D and -T."""
    options = {key: kwargs[key] for key in ("num_classes", "global_pool")}
    blocks = [BasicBlock, BasicBlock, Bottleneck, BasicBlock]
    # A bottleneck makes four times its channels.
    return ResNet(
        blocks, (2, 2, 2, 2), stem_type="deep", stem_width=4, avg_down=True, channels=(8, 12, 4, 20), **options
    )


@dataclass
class ArrayView:
    """A slide in memory: ``pixels_hwc`` of any number of channels, and the colour of its background, if it has one."""

    pixels_hwc: np.ndarray
    background: np.ndarray | None = None

    @property
    def size(self) -> Size:
        return Size(self.pixels_hwc.shape[1], self.pixels_hwc.shape[0])

    def read(self, px_box: Box) -> np.ndarray:
        assert Box.covering(self.size).contains(px_box), "the engine reads outside the slide"
        return self.pixels_hwc[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        return False


def random_view(size: Size, *, seed: int = 0, channels: int = 3) -> ArrayView:
    """Noise with some low frequencies, so that neither edges nor averages are all alike."""
    rng = np.random.default_rng(seed)
    shape = (size.height, size.width, channels)
    ramp = np.linspace(0, 1, size.width)[None, :, None] * np.linspace(1, 0.3, size.height)[:, None, None]
    return ArrayView((0.6 * rng.random(shape) + 0.4 * ramp).astype(np.float32))


Paint = Callable[[np.ndarray, np.ndarray], np.ndarray]

BACKGROUND = np.array([0.9, 0.8, 0.95], np.float32)


def disc(x: float, y: float, radius: float) -> Paint:
    return lambda across, down: (across - x) ** 2 + (down - y) ** 2 < radius**2


#: Where there is tissue, by coordinates from 0 to 1.
SHAPES: dict[str, Paint] = {
    "disc": disc(0.55, 0.5, 0.2),
    "corner": disc(0.0, 0.0, 0.4),
    "right edge": disc(1.0, 0.6, 0.15),
    "pieces": lambda x, y: disc(0.25, 0.3, 0.05)(x, y) | disc(0.8, 0.7, 0.09)(x, y) | disc(0.75, 0.2, 0.02)(x, y),
    "ring": lambda x, y: disc(0.5, 0.5, 0.4)(x, y) & ~disc(0.5, 0.5, 0.35)(x, y),
    "none": lambda x, y: x < 0,
    "everywhere": lambda x, y: x >= 0,
}


def painted(shape: str, size: Size, background: np.ndarray | None = BACKGROUND) -> ArrayView:
    down, across = np.mgrid[: size.height, : size.width]
    tissue = SHAPES[shape](across / size.width, down / size.height)
    pixels = np.where(tissue[..., None], random_view(size).pixels_hwc, BACKGROUND)
    return ArrayView(pixels.astype(np.float32), background)


def build(backbone: str, stages: int, *, seed: int = 0, classes: int = 3, **config: Any) -> LocalNetwork:
    """A network with every weight and norm statistic redrawn, so that no branch is dead."""
    network = build_network(
        ModelConfig(backbone=backbone, stages=stages, weights="random", **config),
        classes=classes,
        pixel_mean=(0.45, 0.5, 0.55),
        pixel_std=(0.25, 0.3, 0.2),
        seed=seed,
        class_weights=[0.7, 1.3, 1.0][:classes],
    )
    redraw(network, seed)
    return network


@torch.no_grad()
def redraw(module: nn.Module, seed: int) -> None:
    """Weights of 0.5 to 1.5 times He's standard deviation; norms, layer scales and statistics between 0.5 and 1.5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)

    def factor(value: Tensor) -> Tensor:
        return 0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype)

    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            if name == "bias":
                value.copy_(0.2 * normal(value))
            elif value.ndim >= 2 and isinstance(owner, nn.Conv2d | nn.Linear):
                he = math.sqrt(2 / value[0].numel())
                value.copy_(normal(value) * he * factor(torch.ones(1)))
            else:
                value.copy_(factor(value))
        if isinstance(owner, nn.BatchNorm2d) and owner.running_mean is not None and owner.running_var is not None:
            owner.running_mean.copy_(0.2 * normal(owner.running_mean))
            owner.running_var.copy_(factor(owner.running_var))


def plan_for(
    network: LocalNetwork,
    tile_px: int,
    precision: Precision = "fp64",
    *,
    kept_px: int = 0,
    channels_last: bool = False,
    elide: bool = True,
    store: StorePlace = "host",
) -> Plan:
    parts = network.depth + 1
    sides, kept = (tile_px,) * parts, (kept_px,) * parts
    return Plan(Execution(precision, channels_last), store, sides, kept, Size(1, 1), elide=elide)


#: Every place for features with no graph kept, about half of them, and all.
STORES_AND_KEPT: dict[str, tuple[StorePlace, float]] = {
    "host": ("host", 0.0),
    "host, half kept": ("host", 0.5),
    "host, all kept": ("host", 100.0),
    "disk": ("disk", 0.0),
    "disk, half kept": ("disk", 0.5),
    "disk, all kept": ("disk", 100.0),
    "device, half kept": ("device", 0.5),
}


def streaming(network: LocalNetwork, tile_px: int, precision: Precision = "fp64", **choices: Any) -> StreamingEngine:
    return StreamingEngine(network, plan_for(network, tile_px, precision, **choices), CPU)


def whole(network: LocalNetwork, precision: Precision = "fp64", *, channels_last: bool = False) -> WholeEngine:
    return WholeEngine(network, Execution(precision, channels_last), CPU, record=True)


def gradients_of(network: LocalNetwork) -> dict[str, Tensor]:
    """A copy of every gradient that is there, by the parameter's name."""
    return {name: p.grad.detach().clone() for name, p in network.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ‖Δg‖/‖g‖ of any parameter.

    A parameter that only one side has, and a reference of NaN or of zero (but for rounding), which would prove nothing,
    are failures.
    """
    assert found.keys() == expected.keys(), f"not the same parameters: {sorted(found.keys() ^ expected.keys())}"
    assert found, "nothing to compare"
    largest = max(reference.norm().item() for reference in expected.values())
    worst = 0.0
    for name, reference in expected.items():
        norm = reference.norm().item()
        assert math.isfinite(norm), f"the reference gradient of {name} is not finite"
        assert norm > _VANISHING * largest, f"the reference gradient of {name} is zero"
        error = (found[name].to(reference) - reference).norm().item() / norm
        assert math.isfinite(error), f"the gradient of {name} is not finite"
        worst = max(worst, error)
    return worst


def output_error(found: StepResult, expected: OracleStep | StepResult) -> float:
    """The largest difference of a loss or a probability."""
    pairs = [
        (found.classification_losses, expected.classification_losses),
        (found.reconstruction_losses, expected.reconstruction_losses),
        (found.probabilities, np.stack(list(expected.probabilities))),
    ]
    worst = 0.0
    for a, b in pairs:
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        assert (np.isnan(a) == np.isnan(b)).all(), "not the same stages were run"
        worst = max(worst, float(np.nanmax(np.abs(a - b), initial=0.0)))
    return worst


def assert_not_vacuous(
    engine: StreamingEngine, size: Size, *, axes: str = "xy", stages: list[int] | None = None
) -> None:
    """Every stage has four tiles, one of which needs its halo on both sides of the axes and finds it inside the slide."""
    network = engine.network
    for number in stages or range(1, network.depth + 1):
        input_size = network.feature_size(size, number - 1)
        tiles = engine.runner.tiles(number, input_size)
        assert len(tiles) >= 4, f"stage {number} has {len(tiles)} tiles"
        locality = network.stage(number).locality

        def free(start: int, stop: int, axis: AxisLocality, length: int) -> bool:
            first, last = start * axis.stride - axis.before, (stop - 1) * axis.stride + axis.after
            return first >= 0 and last < length and (start > 0 or axis.before == 0)

        assert any(
            ("x" not in axes or free(t.cell_own.left, t.cell_own.right, locality.x, input_size.width))
            and ("y" not in axes or free(t.cell_own.top, t.cell_own.bottom, locality.y, input_size.height))
            for t in tiles
        ), f"every halo of stage {number} is clipped at {size}"


def halo_of(stage: Stage, side: Side) -> int:
    axis = stage.locality.x if side in ("left", "right") else stage.locality.y
    return axis.halo_before if side in ("left", "top") else axis.halo_after


@contextmanager
def smaller_halo(stage: Stage, side: Side) -> Iterator[None]:
    """The stage claims to reach one stride-aligned step less far on one side."""
    right, halo = stage.locality, halo_of(stage, side)
    axis = right.x if side in ("left", "right") else right.y
    if side in ("left", "top"):
        changed = replace(axis, before=(halo - 1) * axis.stride)
    else:
        changed = replace(axis, after=halo * axis.stride - 1)
    stage.locality = Locality(changed, right.y) if side in ("left", "right") else Locality(right.x, changed)
    assert halo_of(stage, side) == halo - 1
    try:
        yield
    finally:
        stage.locality = right
