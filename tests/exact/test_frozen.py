"""A classifier on a backbone that is not trained gets the gradients that it has in the network that is."""

from __future__ import annotations

import pytest
from cases import DRAWS, build, gradient_error, gradients_of, painted, random_view, streaming, whole
from oracle import Oracle

from wholeslide.geometry import Size

EXACT = 1e-9
SIZE = Size(611, 573)


@pytest.mark.parametrize("engine_name", ["recomputed", "kept", "disk", "elided", "whole"])
def test_the_classifier_of_a_frozen_backbone_has_the_same_gradients(engine_name: str) -> None:
    view = painted("disc", SIZE) if engine_name == "elided" else random_view(SIZE)
    network = build("resnet_tiny", 1).double()
    expected = Oracle(network).step(view.pixels_hwc, 2, DRAWS).gradients
    frozen = build("resnet_tiny", 1, frozen=True).double()
    frozen.load_state_dict(network.state_dict())
    choices = {"kept": {"kept_px": 10**9}, "disk": {"store": "disk"}}.get(engine_name, {})
    engine = whole(frozen) if engine_name == "whole" else streaming(frozen, 150, **choices)
    before = {name: value.clone() for name, value in frozen.stages.state_dict().items()}
    engine.step(view, 2, DRAWS)
    found = gradients_of(frozen)
    assert found
    assert all(name.startswith("heads.") for name in found)
    assert gradient_error(found, {name: expected[name] for name in found}) <= EXACT
    assert all(value.equal(before[name]) for name, value in frozen.stages.state_dict().items())
    assert frozen.backbone_parameters() == []
