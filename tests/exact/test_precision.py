"""Streamed equals whole in the arithmetic that is trained with, in both memory layouts."""

from __future__ import annotations

import pytest
import torch
from cases import (
    DRAWS,
    STORES_AND_KEPT,
    assert_not_vacuous,
    build,
    gradient_error,
    gradients_of,
    output_error,
    painted,
    random_view,
    streaming,
    whole,
)
from oracle import Oracle
from torch import Tensor

from wholeslide.geometry import Box, Size
from wholeslide.streaming.stores import FeatureStore

SIZE = Size(571, 563)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True])


@LAYOUTS
def test_fp64_does_not_depend_on_the_layout(channels_last: bool) -> None:
    network, view = build("resnet_tiny", 8, reconstruction_region_px=160).double(), random_view(SIZE)
    expected = Oracle(network).step(view.pixels_hwc, 1, DRAWS)
    for engine in (streaming(network, 90, channels_last=channels_last), whole(network, channels_last=channels_last)):
        network.zero_grad()
        assert output_error(engine.step(view, 1, DRAWS), expected) <= 1e-9
        assert gradient_error(gradients_of(network), expected.gradients) <= 1e-9


@LAYOUTS
def test_fp32(channels_last: bool) -> None:
    """Against the statement in fp64: what is left is rounding, some hundred times the unit roundoff of 6e-8."""
    network, view = build("resnet_tiny", 8, reconstruction_region_px=160), random_view(SIZE)
    engine = streaming(network, 90, "fp32", channels_last=channels_last)
    assert_not_vacuous(engine, SIZE)
    result, found = engine.step(view, 1, DRAWS), gradients_of(network)
    expected = Oracle(network.double()).step(view.pixels_hwc, 1, DRAWS)
    assert output_error(result, expected) <= 1e-4
    assert gradient_error(found, expected.gradients) <= 1e-4
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@LAYOUTS
def test_bf16(channels_last: bool) -> None:
    """Streaming adds no error of its own to that of bf16.

    Two bf16 steps that sum in different orders round features to different neighbours, 2^-8 apart. Behind a norm over a few
    grid cells that is up to tens of per cent of a late stage's gradient, for the whole step as for the streamed one; so both
    are held against the step in fp64, each stage's gradient as one vector. What does not pass that norm, the decoders'
    gradients and the losses, agrees to per cents.
    """
    network, view = build("resnet_tiny", 4, reconstruction_region_px=160), random_view(SIZE)
    whole_step = whole(network, "bf16", channels_last=channels_last).step(view, 1, DRAWS)
    whole_gradients = gradients_of(network)
    network.zero_grad()
    streamed_step = streaming(network, 90, "bf16", channels_last=channels_last).step(view, 1, DRAWS)
    streamed_gradients = gradients_of(network)
    assert all(gradient.dtype == torch.float32 for gradient in streamed_gradients.values()), "summed in fp32"
    exact = Oracle(network.double()).step(view.pixels_hwc, 1, DRAWS)
    assert output_error(streamed_step, whole_step) <= 5e-2
    assert output_error(streamed_step, exact) <= 5e-2
    rooms = {room_of(name) for name in exact.gradients}
    for room in rooms:
        streamed_error = distance(streamed_gradients, exact.gradients, room)
        assert streamed_error <= 2 * distance(whole_gradients, exact.gradients, room) + 1e-2, room
        if room.startswith("decoders"):
            assert streamed_error <= 2e-2


@LAYOUTS
@pytest.mark.parametrize("how", ["host", "disk, half kept", "host, all kept"])
def test_bf16_with_background(how: str, channels_last: bool) -> None:
    """What stands for background is rounded as the cells are that it stands for: losses and gradients are those of the dense step,
    but for the order of sums, and no further from fp64."""
    network, view = build("resnet_tiny", 4, reconstruction_region_px=160), painted("pieces", Size(1203, 1007))
    store, kept = STORES_AND_KEPT[how]
    found = []
    for elide in (True, False):
        network.zero_grad()
        kept_px = int(kept * view.size.area)
        choices = {"channels_last": channels_last, "elide": elide, "store": store, "kept_px": kept_px}
        found.append((streaming(network, 90, "bf16", **choices).step(view, 1, DRAWS), gradients_of(network)))
    (elided_step, elided), (dense_step, dense) = found
    assert all(gradient.dtype == torch.float32 for gradient in elided.values())
    exact = Oracle(network.double()).step(view.pixels_hwc, 1, DRAWS)
    assert output_error(elided_step, dense_step) <= 5e-2
    assert output_error(elided_step, exact) <= 5e-2
    for room in {room_of(name) for name in exact.gradients}:
        error = distance(elided, exact.gradients, room)
        assert error <= 2 * distance(dense, exact.gradients, room) + 1e-2, room


def room_of(name: str) -> str:
    """``stages.0``, ``heads.3``, ``decoders.1``: whose parameter it is."""
    return ".".join(name.split(".")[:2])


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], room: str) -> float:
    """Relative norm of the difference of all of a room's gradients."""
    names = [name for name in expected if room_of(name) == room]
    a, b = (torch.cat([gradients[name].double().flatten() for name in names]) for gradients in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("backbone", ["resnet_tiny", "test_convnext"])
def test_features_are_rounded_as_they_are_stored(backbone: str) -> None:
    """ConvNeXt's norms give fp32 under autocast: its features too are rounded to the store's type, in both engines."""
    network, view = build(backbone, 2, reconstruction_region_px=160), random_view(Size(297, 301))
    seen: list[Tensor] = []

    def observe(_number: int, x: FeatureStore | None, _z_bchw: Tensor) -> None:
        if x is not None:
            seen.append(x.read(Box.covering(x.size)))

    streaming(network, 90, "bf16").step(view, 1, DRAWS, observer=observe)
    reference = whole(network, "bf16")
    reference.step(view, 1, DRAWS)
    assert seen[0].dtype == torch.bfloat16
    assert {x.dtype for x in reference.features} == {torch.bfloat16}
    difference = (seen[0] - reference.features[1]).float().norm() / reference.features[1].float().norm()
    assert difference <= 2e-2  # a dozen roundings of 2^-9 in each engine
