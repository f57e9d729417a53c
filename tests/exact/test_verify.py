"""``verify``: it finds streaming exact, it says when it had to look at more, and it can fail."""

from __future__ import annotations

import math

import pytest
import torch

from wholeslide.errors import ConfigError, ModelError
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.locality import AxisLocality, Locality
from wholeslide.model.network import build_network
from wholeslide.model.stages import Stage
from wholeslide.verify import _relative_error, redraw_weights, telling_size, verify
from wholeslide.verify_config import VerifyConfig

SMALL = {"backbone": "resnet10t", "stages": 2, "tile": 96, "size": "301x283"}


def test_streamed_equals_whole() -> None:
    found = verify(VerifyConfig(**SMALL))
    assert found["max_gradient_error"] <= 1e-9
    assert [stage["stage"] for stage in found["stages"]] == [1, 2]
    assert all(stage["tiles"] >= 4 for stage in found["stages"])
    assert all(stage["output_error"] <= 1e-12 for stage in found["stages"])


def test_a_size_that_would_check_little_is_enlarged() -> None:
    found = verify(VerifyConfig(**{**SMALL, "size": "100x90", "tile": 64}))
    assert found["enlarged"]
    assert Size.parse(found["size"]) > Size(100, 90)


def test_a_grid_that_would_hide_a_constant_is_enlarged() -> None:
    """Where all cells of the last grid see equally many cells, ConvNeXt's last bias has no gradient to compare."""
    network = build_network(
        ModelConfig(backbone="test_convnext", stages=1, weights="random"),
        classes=2,
        pixel_mean=[0.5] * 3,
        pixel_std=[0.3] * 3,
        seed=0,
    )
    even, uneven = Size(1600, 1600), Size(1632, 1632)
    assert network.feature_size(even, 1).width % network.head(1).kernel == 0
    assert telling_size(network, even, (320, 320)) == uneven
    assert telling_size(network, uneven, (320, 320)) == uneven


def test_a_halo_that_is_too_small_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Stage.__init__

    def cut_short(self: Stage, *args: object, **kwargs: object) -> None:
        true(self, *args, **kwargs)  # type: ignore[arg-type]
        x = self.locality.x
        if x.halo_before:
            shorter = AxisLocality(x.stride, x.before - x.stride, x.after, x.path)
            self.locality = Locality(shorter, self.locality.y)

    monkeypatch.setattr(Stage, "__init__", cut_short)
    assert verify(VerifyConfig(**SMALL))["max_gradient_error"] > 1e-4


@pytest.mark.parametrize("reference", [torch.zeros(3), torch.full((3,), math.nan), None])
def test_a_gradient_that_is_zero_missing_or_not_a_number_is_infinitely_wrong(reference: torch.Tensor | None) -> None:
    assert _relative_error(reference, torch.ones(3)) == math.inf


def test_redrawn_weights_leave_no_branch_dead() -> None:
    network = build_network(
        ModelConfig(backbone="convnext_atto", stages=2, weights="random"),
        classes=2,
        pixel_mean=[0.5] * 3,
        pixel_std=[0.3] * 3,
        seed=0,
    )
    assert min(float(p.detach().abs().max()) for name, p in network.named_parameters() if "gamma" in name) < 1e-5
    redraw_weights(network, 0)
    assert min(float(p.detach().abs().min()) for name, p in network.named_parameters() if "gamma" in name) > 0.1


def test_the_telling_size_has_an_unclipped_tile_in_every_stage() -> None:
    network = build_network(
        ModelConfig(backbone="resnet10t", stages=4, weights="random"),
        classes=2,
        pixel_mean=[0.5] * 3,
        pixel_std=[0.3] * 3,
        seed=0,
    )
    size = telling_size(network, Size(64, 64), (96,) * 5)
    last = network.stage(4).locality.x
    cells = network.feature_size(size, 4).width
    assert cells >= last.halo_before + 5 + last.halo_after


def test_wrong_questions_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"not a tile \(--tile 0\)"):
        verify(VerifyConfig(tile=0))
    with pytest.raises(ConfigError, match=r"not a size \('7'\): write WIDTHxHEIGHT"):
        verify(VerifyConfig(size="7"))
    with pytest.raises(ModelError, match="cannot cut 4 blocks into 5 stages"):
        verify(VerifyConfig(backbone="resnet10t", stages=5))
