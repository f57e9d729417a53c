"""Random feature reconstruction: where regions lie, what they are compared with, and the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import build_network
from wholeslide.model.reconstruction import FeatureReconstruction, draw_regions, target_box
from wholeslide.streaming.objective import StageObjective


def regions(x_size: Size, *, area_px: int, stride_px: int = 6, most: int = 10, seed: int = 0) -> list[Box]:
    return draw_regions(
        np.random.default_rng(seed), x_size=x_size, stride_px=stride_px, view_area_px=area_px, most=most, region_px=768
    )


@pytest.mark.parametrize(
    ("area_px", "count"),
    [
        (1, 1),
        (768**2 - 1, 1),
        (2 * 768**2 - 1, 1),
        (2 * 768**2, 2),
        (9 * 768**2, 9),
        (10 * 768**2, 10),
        (100 * 768**2, 10),
    ],
)
def test_as_many_regions_as_fit_side_by_side(area_px: int, count: int) -> None:
    assert len(regions(Size(1000, 1000), area_px=area_px)) == count


@pytest.mark.parametrize(("stride_px", "side"), [(6, 128), (12, 64), (24, 32), (48, 16), (4, 192), (1000, 1)])
def test_a_region_is_768_pixels_a_side(stride_px: int, side: int) -> None:
    (region,) = regions(Size(500, 500), area_px=1, stride_px=stride_px)
    assert region.size == Size(side, side)


def test_regions_are_clipped_to_a_small_slide() -> None:
    assert regions(Size(50, 300), area_px=1)[0].size == Size(50, 128)
    assert regions(Size(7, 5), area_px=1) == [Box(0, 0, 7, 5)]


@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 1000))
def test_regions_lie_inside(width: int, height: int, seed: int) -> None:
    drawn = regions(Size(width, height), area_px=10**9, seed=seed)
    assert len(drawn) == 10
    assert all(Box.covering(Size(width, height)).contains(region) for region in drawn)
    assert len({region.size for region in drawn}) == 1


def test_origins_reach_every_place() -> None:
    """Both ends are drawn, the last possible origin too."""
    lefts = {r.left for seed in range(60) for r in regions(Size(130, 129), area_px=10**9, seed=seed)}
    tops = {r.top for seed in range(60) for r in regions(Size(130, 129), area_px=10**9, seed=seed)}
    assert lefts == {0, 1, 2}
    assert tops == {0, 1}


def test_target_is_short_at_an_odd_border() -> None:
    """x_k has 5 cells of stride 2 above 9 cells of x_{k−1}."""
    assert target_box(Box(3, 0, 2, 2), stride=2, target_size=Size(9, 9)) == Box(6, 0, 3, 4)
    assert target_box(Box(0, 3, 2, 2), stride=2, target_size=Size(9, 9)) == Box(0, 6, 4, 3)
    assert target_box(Box(1, 1, 2, 2), stride=2, target_size=Size(9, 9)) == Box(2, 2, 4, 4)


def test_decoder_by_hand() -> None:
    """Upsampled by 2 with its corners not aligned, the row (0, 4) is (0, 1, 3, 4)."""
    decoder = FeatureReconstruction(1, 2, stride=2).double()
    assert decoder.widen.bias is None
    assert decoder.to_target.bias is not None
    with torch.no_grad():
        for convolution in (decoder.widen, decoder.to_target):
            convolution.weight.zero_()
            convolution.weight[:, :, 1, 1] = 1  # the cell itself
        decoder.to_target.bias.copy_(torch.tensor([0.0, 10.0]))
    output = decoder(torch.tensor([[[[0.0, 4.0]]]], dtype=torch.float64))
    assert output.shape == (1, 2, 2, 4)
    normed = (np.array([0, 1, 3, 4]) - 2) / np.sqrt(2.5 + 1e-5)
    expected = np.maximum(normed, 0)
    np.testing.assert_allclose(output[0, 0].detach().numpy(), [expected, expected], atol=1e-12)
    np.testing.assert_allclose(output[0, 1].detach().numpy(), [expected + 10] * 2, atol=1e-12)


def test_decoder_of_stride_one_keeps_the_size() -> None:
    assert FeatureReconstruction(3, 2, stride=1)(torch.randn(2, 3, 4, 5)).shape == (2, 2, 4, 5)


def test_statistics_are_those_of_all_regions_in_every_mode() -> None:
    decoder = FeatureReconstruction(2, 2, stride=1).double()
    batch = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    in_training = decoder(batch)
    assert torch.equal(decoder.eval()(batch), in_training)
    assert not torch.allclose(decoder(batch[:1]), in_training[:1])


class _Fixed(nn.Module):
    """A decoder whose output is given."""

    def __init__(self, decoded_rchw: torch.Tensor) -> None:
        super().__init__()
        self.decoded_rchw = decoded_rchw

    def forward(self, _regions_rchw: torch.Tensor) -> torch.Tensor:
        return self.decoded_rchw


def objective(decoded_rchw: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> StageObjective:
    network = build_network(
        ModelConfig(backbone="test_convnext", stages=2, weights="random"),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )
    fixed = _Fixed(decoded_rchw)
    monkeypatch.setattr(type(network), "decoder", lambda _self, number: fixed if number == 1 else None)
    return StageObjective(network, 1, 0, Draws(0, 0, "a"), Size(900, 900))


def test_the_loss_is_the_mean_over_all_cells_of_all_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two regions; the second's target is cropped to one cell of four, so that it weighs a quarter of the first."""
    decoded = torch.zeros((2, 1, 2, 2))
    targets = [torch.full((1, 1, 2, 2), 1.0), torch.full((1, 1, 1, 1), 6.0)]
    loss = objective(decoded, monkeypatch).reconstruction(torch.zeros(2, 1, 1, 1), targets)
    assert loss.item() == pytest.approx((4 * 1 + 1 * 6) / 5)


def test_only_stages_before_the_last_reconstruct(monkeypatch: pytest.MonkeyPatch) -> None:
    first = objective(torch.zeros(1, 1, 1, 1), monkeypatch)
    assert first.regions(Size(100, 100))
    last = StageObjective(first.network, 2, 0, first.draws, first.view_size)
    assert last.regions(Size(100, 100)) == []


def test_stages_and_epochs_draw_other_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    first = objective(torch.zeros(1, 1, 1, 1), monkeypatch)
    again = StageObjective(first.network, 1, 0, Draws(0, 0, "a"), first.view_size)
    later = StageObjective(first.network, 1, 0, Draws(0, 1, "a"), first.view_size)
    size = Size(1000, 1000)
    assert first.regions(size) == again.regions(size) != later.regions(size)
