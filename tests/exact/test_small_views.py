"""Slides smaller than a tile, than a region, than a cell of the classifier's grid."""

from __future__ import annotations

import pytest
from cases import DRAWS, build, gradient_error, gradients_of, output_error, random_view, streaming, whole
from oracle import Oracle

from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork

EXACT = 1e-9


def padded_minimum(network: LocalNetwork, size: Size) -> Size:
    padded = network.padded_size(size)
    assert padded != size, "not below the minimum"
    return padded


def assert_exact(network: LocalNetwork, size: Size, tile_px: int, *, seed: int = 0) -> None:
    view, draws = random_view(size, seed=seed), DRAWS
    expected = Oracle(network).step(view.pixels_hwc, 0, draws)
    for engine in (streaming(network, tile_px), whole(network)):
        network.zero_grad()
        result = engine.step(view, 0, draws)
        assert output_error(result, expected) <= EXACT
        assert gradient_error(gradients_of(network), expected.gradients) <= EXACT


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_slide_smaller_than_a_tile_and_a_region(stages: int) -> None:
    """One tile a stage; regions of 768 px are clipped to the slide."""
    network = build("resnet_tiny", stages).double()
    engine, size = streaming(network, 4096), Size(397, 301)
    for number in range(1, stages + 1):
        assert len(engine.runner.tiles(number, network.feature_size(size, number - 1))) == 1
    assert_exact(network, size, 4096)


@pytest.mark.parametrize("stages", [1, 4])
def test_smaller_than_a_tile_along_one_axis(stages: int) -> None:
    assert_exact(build("resnet_tiny", stages, reconstruction_region_px=200).double(), Size(1303, 61), 200)


@pytest.mark.parametrize(
    ("backbone", "stages", "size"),
    [("resnet_tiny", 1, Size(40, 33)), ("resnet_tiny", 4, Size(33, 47)), ("test_convnext", 4, Size(70, 32))],
    ids=str,
)
def test_padded_minimum(backbone: str, stages: int, size: Size) -> None:
    """The smallest view that a network takes: two cells in its poorest grid."""
    network = build(backbone, stages).double()
    assert_exact(network, padded_minimum(network, size), 96)


@pytest.mark.parametrize("size", [Size(511, 383), Size(512, 384), Size(513, 385)], ids=str)
def test_sizes_around_a_multiple_of_every_grid(size: Size) -> None:
    """Odd borders: a region's target is short of ``stride`` times the region, and the last grid cells are padded."""
    assert_exact(build("resnet_tiny", 8, reconstruction_region_px=200, first_stride=2).double(), size, 100)


def test_every_region_at_the_odd_border() -> None:
    """Regions as wide as the slide always meet the border where the target is a cell short."""
    network = build("resnet_tiny", 4, reconstruction_region_px=160, reconstruction_regions=3).double()
    x_sizes = [network.feature_size(Size(427, 155), number) for number in range(4)]
    assert any(size.height % 2 for size in x_sizes)
    assert_exact(network, Size(427, 155), 100)
