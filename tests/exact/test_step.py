"""A step, streamed and whole, against the independent statement of it: every loss, probability and gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from cases import (
    DRAWS,
    STORES_AND_KEPT,
    assert_not_vacuous,
    build,
    gradient_error,
    gradients_of,
    output_error,
    random_view,
    streaming,
    whole,
)
from oracle import Oracle, OracleStep

from wholeslide.draws import Draws
from wholeslide.geometry import Size
from wholeslide.model import strips
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.stage_pass import StageStep

EXACT = 1e-9


@dataclass(frozen=True)
class Case:
    backbone: str
    stages: int
    size: str
    tile_px: int
    config: dict[str, Any] = field(default_factory=lambda: {"reconstruction_region_px": 160})
    #: axes along which a tile of every stage finds its whole halo inside the slide; strips keep the large networks quick
    axes: Literal["x", "y", "xy"] = "xy"

    def __str__(self) -> str:
        variant = "".join(f"-{key}={value}" for key, value in self.config.items() if key != "reconstruction_region_px")
        return f"{self.backbone}-K{self.stages}-{self.size}{variant}"


CASES = [
    Case("resnet_tiny", 1, "1027x1013", 240),
    Case("resnet_tiny", 2, "1027x1013", 240),
    Case("resnet_tiny", 4, "1001x983", 200),
    Case("resnet_tiny", 8, "571x563", 90),
    Case("resnet_tiny", 3, "1001x1003", 170),
    Case("resnet_tiny", 4, "997x1009", 240, {}),  # a single region of 768 px
    Case("resnet_tiny", 4, "961x960", 200, {"reconstruction": False}),
    Case("resnet_tiny", 8, "571x563", 90, {"freeze_norm_affine": True, "reconstruction_weight": 0.3}),
    Case("resnet_tiny", 8, "583x559", 90, {"first_stride": 2, "reconstruction_region_px": 100}),
    Case("resnet18", 8, "787x97", 90, axes="x"),
    Case("resnet18", 4, "97x985", 200, axes="y"),
    Case("regnetx_002", 4, "661x67", 100, axes="x"),
    Case("mobilenetv2_050", 4, "67x673", 100, axes="y"),
    Case("test_convnext", 4, "67x1033", 160, axes="y"),
]
SLOW = [
    Case("efficientnet_lite0", 4, "993x97", 120, axes="x"),
    Case("convnext_atto", 4, "1153x73", 160, axes="x"),
    Case("resnet34", 1, "1587x301", 96, {}, axes="x"),
    Case("resnet34", 2, "1507x301", 96, {}, axes="x"),
    Case("resnet34", 4, "1087x311", 96, {}, axes="x"),
    Case("resnet34", 8, "941x947", 96, {}),
]


@dataclass
class Reference:
    case: Case
    network: LocalNetwork
    step: OracleStep


@pytest.fixture(
    scope="module", params=[*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def reference(request: pytest.FixtureRequest) -> Reference:
    case = request.param
    network = build(case.backbone, case.stages, **case.config).double()
    view = random_view(Size.parse(case.size))
    assert network.padded_size(view.size) == view.size
    step = Oracle(network).step(view.pixels_hwc, 1, DRAWS)
    if network.config.freeze_norm_affine:
        trainable = {name for name, p in network.named_parameters() if p.requires_grad}
        step.gradients = {name: gradient for name, gradient in step.gradients.items() if name in trainable}
    return Reference(case, network, step)


@pytest.fixture(autouse=True)
def without_gradients(reference: Reference) -> Iterator[None]:
    reference.network.zero_grad()
    yield
    reference.network.zero_grad()


@pytest.mark.parametrize("engine_name", [*STORES_AND_KEPT, "whole"])
def test_engine_equals_the_independent_statement(
    reference: Reference, engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With features on disk in channels-last layout, too, where weights' gradients are summed over strips."""
    monkeypatch.setattr(strips, "_STRIP_BYTES", 20_000)
    case, network, view = reference.case, reference.network, random_view(Size.parse(reference.case.size))
    if engine_name != "whole":
        store, kept = STORES_AND_KEPT[engine_name]
        layout = {"channels_last": store == "disk"}
        engine = streaming(network, case.tile_px, kept_px=int(kept * view.size.area), store=store, **layout)
        assert_not_vacuous(engine, view.size, axes=case.axes)
        result = engine.step(view, 1, DRAWS)
    else:
        reference_engine = whole(network)
        result = reference_engine.step(view, 1, DRAWS)
        for ours, theirs in zip(reference_engine.features, reference.step.features, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-9, atol=1e-11)
        for ours, theirs in zip(reference_engine.grids, reference.step.grids, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-9, atol=1e-11)
    assert output_error(result, reference.step) <= EXACT
    assert gradient_error(gradients_of(network), reference.step.gradients) <= EXACT


def test_half_kept_is_some_of_each(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """In at least one stage, tiles are kept and others are computed twice; with room for all, none is."""
    case, network = reference.case, reference.network
    shares: list[tuple[int, int]] = []
    share_out = StageStep._share_out

    def noted(self: StageStep) -> Any:
        recomputed, kept = share_out(self)
        shares.append((len(recomputed), len(kept)))
        return recomputed, kept

    monkeypatch.setattr(StageStep, "_share_out", noted)
    view = random_view(Size.parse(case.size))
    for share in (0.5, 100.0):
        streaming(network, case.tile_px, kept_px=int(share * view.size.area)).step(view, 1, DRAWS)
    half, everything = shares[: case.stages], shares[case.stages :]
    assert any(recomputed and kept for recomputed, kept in half)
    assert not any(recomputed for recomputed, _ in everything)


def test_all_trainable_parameters_are_compared(reference: Reference) -> None:
    trainable = {name for name, p in reference.network.named_parameters() if p.requires_grad}
    frozen = {name for name, p in reference.network.named_parameters() if not p.requires_grad}
    assert reference.step.gradients.keys() == trainable
    assert frozen
    if not reference.case.config.get("freeze_norm_affine"):
        assert all(name.startswith("stem.") for name in frozen)


def test_another_draw_changes_the_step() -> None:
    """Dropout and regions do take part in what is compared."""
    network = build("resnet_tiny", 2, reconstruction_region_px=160).double()
    view, oracle = random_view(Size(401, 303)), Oracle(network)
    first = oracle.step(view.pixels_hwc, 1, DRAWS)
    other = oracle.step(view.pixels_hwc, 1, Draws(seed=5, epoch=2, slide="a.svs"))
    assert abs(first.reconstruction_losses[0] - other.reconstruction_losses[0]) > 1e-6
    assert np.abs(first.probabilities[1] - other.probabilities[1]).max() > 1e-6
