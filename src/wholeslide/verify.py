"""Streamed equals whole: shown on the user's own machine, with the user's own backbone.

Every weight and norm statistic is redrawn first. A fresh network hides errors: last norms that start at zero and layer scales of
1e-6 switch whole branches off, and a halo that is too small then shows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.locality import AxisLocality
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.execution import Execution
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.reference import WholeEngine
from wholeslide.streaming.stores import FeatureStore
from wholeslide.streaming.tiles import Tile, tile_side
from wholeslide.verify_config import VerifyConfig

#: The largest relative difference of a gradient that rounding explains.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3}
_CLASSES, _LABEL = 3, 1
_FEWEST_TILES = 4
_GROWTH_PX = 32
#: Streaming may cost this many times the whole step before ``verify`` takes larger tiles.
_DEAREST_TILING = 24


class RandomSlide:
    """A texture of independent pixels: nothing in it hides a cell that is off by one."""

    background = None

    def __init__(self, size: Size, seed: int) -> None:
        self.size = size
        self._pixels_hwc = np.random.default_rng(seed).random((size.height, size.width, 3), dtype=np.float32)

    def read(self, px_box: Box) -> np.ndarray:
        """Pixels in [0, 1], (h, w, 3)."""
        return self._pixels_hwc[px_box.rows_columns]

    def is_background(self, px_box: Box) -> bool:
        """Nowhere."""
        return False


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Run one step both ways and compare every stage's features, grid and gradients.

    Returns:
        ``stages``: for each its number, ``tiles``, ``output_error`` and ``gradient_error``; ``max_gradient_error``;
        ``tolerance``; ``size`` and ``tile_px`` that were used, and ``enlarged`` where they had to grow. An error is the largest
        of ‖difference‖ / ‖reference‖ over the stage's parameters; a gradient that is zero or not a number is infinitely wrong.

    Raises:
        ConfigError: the size or the tile is not positive.
        ModelError: the backbone is unknown or not local, or has fewer blocks than stages.
    """
    if config.tile < 1:
        raise ConfigError.single(
            "not a tile", where=f"--tile {config.tile}", remedy="give its side in pixels, 1 or more"
        )
    asked = Size.parse(config.size)
    network = build_network(
        ModelConfig(backbone=config.backbone, stages=config.stages, weights="random", first_stride=config.first_stride),
        classes=_CLASSES,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.3, 0.3, 0.3),
        seed=config.seed,
    )
    redraw_weights(network, config.seed)
    execution = Execution(config.dtype, channels_last=True)
    tile_px = _tile_sides(network, config.tile, asked)
    size = telling_size(network, asked, tile_px)
    # About half of the graphs are kept, and the others computed twice.
    plan = Plan(execution, "host", tile_px, kept_px=(size.area // 2,) * len(tile_px), largest=size)
    whole, streamed = _run_both(network, plan, RandomSlide(size, config.seed), config.seed)
    stages = [
        {
            "stage": number,
            "tiles": streamed.tiles[number],
            "output_error": max(map(_relative_error, whole.outputs[number], streamed.outputs[number])),
            "gradient_error": _gradient_error(network, number, whole.gradients, streamed.gradients),
        }
        for number in range(1, network.depth + 1)
    ]
    return {
        "backbone": config.backbone,
        "dtype": config.dtype,
        "size": str(size),
        "tile_px": list(tile_px),
        "enlarged": size != asked or tile_px != (config.tile,) * len(tile_px),
        "stages": stages,
        "max_gradient_error": max(stage["gradient_error"] for stage in stages),
        "tolerance": TOLERANCE[config.dtype],
    }


def redraw_weights(network: nn.Module, seed: int) -> None:
    """Give every weight, bias and norm statistic a random value that keeps all branches alive, 0.5 to 1.5 times He's scale."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)).to(like)

    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                he = (2 / parameter[0].numel()) ** 0.5
                scale = float(uniform(torch.zeros(()), 0.5, 1.5))
                normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(normal * he * scale)
            else:
                signs = uniform(parameter, -1, 1).sign()
                parameter.copy_(uniform(parameter, 0.5, 1.5) * signs * 0.5)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))


def telling_size(network: LocalNetwork, size: Size, tile_px: tuple[int, ...]) -> Size:
    """The smallest size from ``size`` on at which every stage shows an error.

    It has four tiles, one with its halo clipped on no side, and a grid of which some cells reach over the edge: where all see
    equally many cells, the norm behind them removes a constant, and a last bias (ConvNeXt's) has no gradient to compare.
    """
    plan = Plan(Execution("fp32", channels_last=True), "host", tile_px, kept_px=(0,) * len(tile_px), largest=size)
    engine = StreamingEngine(network, plan, torch.device("cpu"))
    size = network.padded_size(size)
    while not all(_telling(engine, number, size) for number in range(1, network.depth + 1)):
        size = network.padded_size(Size(size.width + _GROWTH_PX, size.height + _GROWTH_PX))
    return size


def _telling(engine: StreamingEngine, number: int, size: Size) -> bool:
    input_size = engine.network.feature_size(size, number - 1)
    tiles = engine.runner.tiles(number, input_size)
    x_size, kernel = engine.network.feature_size(size, number), engine.network.head(number).kernel
    return (
        len(tiles) >= _FEWEST_TILES
        and any(_unclipped(engine, number, tile, input_size) for tile in tiles)
        and (x_size.width % kernel != 0 or x_size.height % kernel != 0)
    )


def _unclipped(engine: StreamingEngine, number: int, tile: Tile, input_size: Size) -> bool:
    locality, own = engine.network.stage(number).locality, tile.cell_own
    return (
        own.left >= locality.x.halo_before
        and own.top >= locality.y.halo_before
        and (own.right + locality.x.halo_after) * locality.x.stride <= input_size.width
        and (own.bottom + locality.y.halo_after) * locality.y.stride <= input_size.height
    )


def _tile_sides(network: LocalNetwork, tile_px: int, size: Size) -> tuple[int, ...]:
    """The side asked for; larger only where nearly all the work would be the same halo, computed again and again."""
    sides = [tile_px]
    for number in range(1, network.depth + 1):
        stage, step = network.stage(number), network.head(number).kernel
        asked = tile_side(tile_px, stride_px=stage.stride, align=step)
        cells = max(size.width, size.height) // stage.stride
        choices = [_tiling_cost(stage.locality.x, side, cells) for side in range(asked, asked + 12 * step, step)]
        best = choices.index(min(choices)) if choices[0] > _DEAREST_TILING * cells**2 else 0
        sides.append(tile_px if best == 0 else (asked + best * step) * stage.stride)
    return tuple(sides)


def _tiling_cost(axis: AxisLocality, side: int, cells: int) -> int:
    """Cells that tiles of ``side`` cells compute, halos included, on the least telling square of at least ``cells`` a side."""
    unclipped_end = -(-axis.halo_before // side) * side + side + axis.halo_after
    cells = max(cells, unclipped_end)
    window = min(side + axis.halo_before + axis.halo_after, cells)
    return (-(-cells // side) * window) ** 2


class _Outcome:
    """What a step left behind: outputs (x_k where kept, and z_k) and tiles by stage, gradients by parameter."""

    def __init__(self) -> None:
        self.outputs: dict[int, list[Tensor]] = {}
        self.tiles: dict[int, int] = {}
        self.gradients: dict[str, Tensor | None] = {}

    def take_gradients(self, network: LocalNetwork) -> None:
        self.gradients = {name: p.grad for name, p in network.named_parameters()}
        for parameter in network.parameters():
            parameter.grad = None


def _run_both(network: LocalNetwork, plan: Plan, slide: RandomSlide, seed: int) -> tuple[_Outcome, _Outcome]:
    device, draws = torch.device("cpu"), Draws(seed, 0, "verify")
    whole, streamed = _Outcome(), _Outcome()
    reference = WholeEngine(network, plan.execution, device, record=True)
    reference.step(slide, _LABEL, draws)
    for number in range(1, network.depth + 1):
        features = [reference.features[number]] if number < network.depth else []
        whole.outputs[number] = [*features, reference.grids[number - 1]]
    whole.take_gradients(network)

    engine = StreamingEngine(network, plan, device)
    engine.step(slide, _LABEL, draws, observer=_recorder(streamed))
    for number in range(1, network.depth + 1):
        streamed.tiles[number] = len(engine.runner.tiles(number, network.feature_size(slide.size, number - 1)))
    streamed.take_gradients(network)
    return whole, streamed


def _recorder(outcome: _Outcome) -> Callable[[int, FeatureStore | None, Tensor], None]:
    def record(number: int, x: FeatureStore | None, z_bchw: Tensor) -> None:
        features = [x.read(Box.covering(x.size))] if x is not None else []
        outcome.outputs[number] = [*features, z_bchw.detach().clone()]

    return record


def _relative_error(reference: Tensor | None, value: Tensor | None) -> float:
    if reference is None or value is None:
        return math.inf
    norm = float(reference.double().norm())
    error = float((value.double() - reference.double()).norm()) / norm if norm > 0 else math.inf
    return error if math.isfinite(error) else math.inf


def _gradient_error(
    network: LocalNetwork, number: int, whole: dict[str, Tensor | None], streamed: dict[str, Tensor | None]
) -> float:
    own = {id(p) for p in (*network.backbone_parameters(number), *network.head_parameters(number))}
    names = [name for name, parameter in network.named_parameters() if id(parameter) in own]
    return max(_relative_error(whole[name], streamed[name]) for name in names)
