"""A classifier that works on a few rows of the grid at a time."""

from __future__ import annotations

import pytest
from cases import DRAWS, build, gradient_error, gradients_of, output_error, random_view, streaming
from oracle import Oracle

from wholeslide.geometry import Size
from wholeslide.streaming import grid_gradient

EXACT = 1e-9


def test_a_grid_of_many_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier works on five rows of z at a time, or on one."""
    network, view = build("resnet_tiny", 4, reconstruction_region_px=160).double(), random_view(Size(1001, 983))
    expected = Oracle(network).step(view.pixels_hwc, 1, DRAWS)
    for rows in (5, 1):
        monkeypatch.setattr(grid_gradient, "ROWS_OF_A_PART", rows)
        network.zero_grad()
        assert output_error(streaming(network, 200).step(view, 1, DRAWS), expected) <= EXACT
        assert gradient_error(gradients_of(network), expected.gradients) <= EXACT
