"""A halo smaller by one stride-aligned step, on any one side, of any stage, must be noticed.

Each stage is tried alone, on random features of the size at which a tile in the middle of a strip needs both its halos: a
strip that is one cell of x_k broad is enough, because only the side along it is shortened.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cases import (
    DRAWS,
    SIDES,
    Side,
    assert_not_vacuous,
    build,
    gradient_error,
    gradients_of,
    halo_of,
    output_error,
    random_view,
    redraw,
    smaller_halo,
    streaming,
    whole,
)
from torch import fx, nn

from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.heads import AttentionClassifier
from wholeslide.model.network import LocalNetwork
from wholeslide.model.stages import Stage

EXACT = 1e-9
KERNEL, OWN_CELLS = 2, 6
NETWORKS = [
    ("resnet34", 4),
    ("resnet18", 8),
    ("convnext_atto", 4),
    ("efficientnet_lite0", 16),
    ("regnetx_002", 4),
    ("resnet_tiny", 1),
    ("resnet_tiny", 2),
]
SLOW_NETWORKS = [("efficientnet_lite0", 4), ("resnet34", 2), ("resnet34", 8)]
STAGES = [(backbone, stages, number) for backbone, stages in NETWORKS for number in range(1, stages + 1)]
SLOW_STAGES = [
    pytest.param(backbone, stages, number, marks=pytest.mark.slow)
    for backbone, stages in SLOW_NETWORKS
    for number in range(1, stages + 1)
]


@functools.lru_cache(maxsize=1)
def backbone_network(backbone: str, stages: int) -> LocalNetwork:
    return build(backbone, stages)


def lone_stage(backbone: str, stages: int, number: int) -> LocalNetwork:
    """A network of one stage whose pixels are the features x_{k−1}: its stem does nothing."""
    stage = backbone_network(backbone, stages).stage(number)
    channels = stage.in_channels
    alone = Stage(stage.body, name=backbone, in_channels=channels, out_channels=stage.out_channels, input_stride=1)
    identity = fx.symbolic_trace(nn.Identity())
    stem = Stage(identity, name="identity", in_channels=channels, out_channels=channels, input_stride=1)
    # A classifier of the usual kernel has more weights than the rest together, and has no part in the halo.
    head = AttentionClassifier(stage.out_channels, kernel=KERNEL, attention_hidden=8, hidden=16, classes=3, dropout=0.2)
    network = LocalNetwork(
        stem,
        [alone],
        [head],
        [],
        pixel_mean=[0.0] * channels,
        pixel_std=[1.0] * channels,
        config=ModelConfig(backbone="resnet_tiny", stages=1, reconstruction=False),
    )
    redraw(network.heads, number)
    network.zero_grad()  # the stage is shared by the tests
    return network.double()


def strip_size(network: LocalNetwork, axis: str) -> Size:
    """Features with four tiles along an axis, one of which needs both its halos."""
    stage = network.stage(1)
    reach = stage.locality.x.halo_before + OWN_CELLS + stage.locality.x.halo_after
    # Not a multiple of the kernel: with no padding, a shift of a whole channel is lost in the classifier's norm.
    cells = max(4, -(-reach // OWN_CELLS) + 2) * OWN_CELLS + 1
    length, breadth = cells * stage.locality.stride, stage.locality.stride
    return Size(length, breadth) if axis == "x" else Size(breadth, length)


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize(("backbone", "stages", "number"), [*STAGES, *SLOW_STAGES])
def test_shrunken_halo_is_noticed(backbone: str, stages: int, number: int, axis: str) -> None:
    network = lone_stage(backbone, stages, number)
    view = random_view(strip_size(network, axis), channels=network.stage(1).in_channels)
    engine = streaming(network, OWN_CELLS * network.stage(1).stride)
    assert_not_vacuous(engine, view.size, axes=axis)
    expected_step = whole(network).step(view, 1, DRAWS)
    expected = gradients_of(network)

    def errors() -> tuple[float, float]:
        network.zero_grad()
        step = engine.step(view, 1, DRAWS)
        return output_error(step, expected_step), gradient_error(gradients_of(network), expected)

    sound = errors()
    assert max(sound) <= EXACT
    sides: tuple[Side, ...] = ("left", "right") if axis == "x" else ("top", "bottom")
    for side in sides:
        if halo_of(network.stage(1), side) > 0:
            with smaller_halo(network.stage(1), side):
                assert errors()[1] > EXACT, f"a smaller halo at the {side} of stage {number} goes unnoticed"


def test_every_stage_has_a_halo_to_shrink() -> None:
    for backbone, stages, number in STAGES:
        assert any(halo_of(backbone_network(backbone, stages).stage(number), side) for side in SIDES)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_shrunken_halo_is_noticed_in_a_full_step(number: int, side: Side) -> None:
    """With reconstruction and all stages; the stages before the shrunken one stay exact."""
    network = build("resnet_tiny", 4, reconstruction_region_px=160).double()
    view = random_view(Size(967, 961))
    whole(network).step(view, 1, DRAWS)
    expected = gradients_of(network)
    engine = streaming(network, 200)
    assert_not_vacuous(engine, view.size)
    network.zero_grad()
    with smaller_halo(network.stage(number), side):
        engine.step(view, 1, DRAWS)
    found = gradients_of(network)

    def error(stage: int) -> float:
        names = [name for name in expected if int(name.split(".")[1]) + 1 == stage]
        return gradient_error({n: found[n] for n in names}, {n: expected[n] for n in names})

    assert all(error(stage) <= EXACT for stage in range(1, number))
    assert error(number) > EXACT


@pytest.mark.parametrize("side", SIDES)
def test_shrunken_halo_of_the_stem_is_noticed(side: Side) -> None:
    network = build("resnet_tiny", 1).double()
    view = random_view(Size(421, 389))
    sound = streaming(network, 90).predict(view)
    np.testing.assert_allclose(streaming(network, 4096).predict(view), sound, rtol=0, atol=1e-12)
    with smaller_halo(network.stem, side):
        assert np.abs(streaming(network, 90).predict(view) - sound).max() > EXACT
