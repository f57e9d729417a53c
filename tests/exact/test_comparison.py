"""The comparison itself can fail: each way in which a check could be passed for nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DRAWS, assert_not_vacuous, build, gradient_error, gradients_of, output_error, random_view, streaming

from wholeslide.geometry import Size
from wholeslide.streaming.step import StepResult

GOOD = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}


def test_the_error_is_the_worst_parameters_relative_norm() -> None:
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([1.01])}
    assert gradient_error(found, GOOD) == pytest.approx(0.1)
    assert gradient_error(GOOD, GOOD) == 0


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        ({"a": GOOD["a"]}, GOOD, "not the same parameters"),
        (GOOD, {"a": GOOD["a"]}, "not the same parameters"),
        ({}, {}, "nothing to compare"),
        (GOOD, {"a": GOOD["a"], "b": torch.tensor([0.0])}, "gradient of b is zero"),
        (GOOD, {"a": GOOD["a"], "b": torch.tensor([1e-15])}, "gradient of b is zero"),
        (GOOD, {"a": GOOD["a"], "b": torch.tensor([math.nan])}, "gradient of b is not finite"),
        ({"a": GOOD["a"], "b": torch.tensor([math.nan])}, GOOD, "gradient of b is not finite"),
    ],
)
def test_what_would_prove_nothing_fails(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        gradient_error(found, expected)


def test_stages_that_did_not_run_are_noticed() -> None:
    ran = StepResult([1.0, 2.0], [0.5, math.nan], np.full((2, 2), 0.5))
    half = StepResult([1.0, math.nan], [0.5, math.nan], np.array([[0.5, 0.5], [math.nan, math.nan]]))
    assert output_error(ran, ran) == 0
    with pytest.raises(AssertionError, match="not the same stages"):
        output_error(ran, half)


def test_initial_weights_would_be_vacuous() -> None:
    """timm's ResNets begin with blocks that do nothing: the redraw is what makes the suite see."""
    network = build("resnet18", 8).double()
    for name, module in network.stages.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.abs().min() >= 0.5, name
            assert module.running_var is not None
            assert (module.running_var != 1).all(), name
    convnext = build("test_convnext", 2)
    gammas = [p for name, p in convnext.named_parameters() if name.endswith("gamma")]
    assert gammas
    assert all(p.min() >= 0.5 for p in gammas)


def test_too_few_tiles_or_only_clipped_halos_are_noticed() -> None:
    network = build("resnet_tiny", 1)
    with pytest.raises(AssertionError, match="has 1 tiles"):
        assert_not_vacuous(streaming(network, 4096), Size(1027, 1013))
    with pytest.raises(AssertionError, match="clipped"):
        assert_not_vacuous(streaming(network, 240), Size(701, 623))


def test_a_wrong_gradient_of_one_weight_is_noticed() -> None:
    network = build("resnet_tiny", 2, reconstruction_region_px=160).double()
    streaming(network, 200).step(random_view(Size(401, 303)), 1, DRAWS)
    right = gradients_of(network)
    for name in right:
        wrong = dict(right)
        wrong[name] = right[name] * (1 + 1e-8)
        assert gradient_error(wrong, right) > 1e-9, name
