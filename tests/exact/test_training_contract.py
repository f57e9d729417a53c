"""What a step promises around its gradients: isolation, schedules, weights, accumulation, inference, observers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DRAWS, ArrayView, build, gradient_error, gradients_of, output_error, random_view, streaming, whole
from oracle import Oracle
from torch import Tensor

from wholeslide.draws import Draws
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.reference import WholeEngine
from wholeslide.streaming.stores import FeatureStore

EXACT = 1e-9
SIZE = Size(611, 573)


def network_of(stages: int = 4) -> LocalNetwork:
    return build("resnet_tiny", stages, reconstruction_region_px=160).double()


def engine_of(name: str, network: LocalNetwork) -> StreamingEngine | WholeEngine:
    return streaming(network, 150) if name == "streamed" else whole(network)


ENGINES = pytest.mark.parametrize("engine_name", ["streamed", "whole"])


@ENGINES
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stages_loss_reaches_no_other_stage(engine_name: str, number: int) -> None:
    network = network_of()
    engine_of(engine_name, network).step(random_view(SIZE), 1, DRAWS, stages={number})
    own = {*network.backbone_parameters(number), *network.head_parameters(number)}
    assert own
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (parameter in own), name


@ENGINES
@pytest.mark.parametrize("stages", [{1}, {3}, {4}, {2, 3}])
def test_training_some_stages_gives_their_share_of_the_full_step(engine_name: str, stages: set[int]) -> None:
    network, view = network_of(), random_view(SIZE)
    expected = Oracle(network).step(view.pixels_hwc, 2, DRAWS, stages=stages)
    result = engine_of(engine_name, network).step(view, 2, DRAWS, stages=stages)
    assert gradient_error(gradients_of(network), expected.gradients) <= EXACT
    for number in range(1, 5):
        found = result.classification_losses[number - 1], result.reconstruction_losses[number - 1]
        if number in stages:
            wanted = expected.classification_losses[number - 1], expected.reconstruction_losses[number - 1]
            np.testing.assert_allclose(found, wanted, rtol=1e-9)
            np.testing.assert_allclose(result.probabilities[number - 1], expected.probabilities[number - 1], rtol=1e-9)
        else:
            assert np.isnan(found).all()
            assert np.isnan(result.probabilities[number - 1]).all()


@ENGINES
def test_frozen_stem_gets_no_gradient(engine_name: str) -> None:
    network = network_of(1)
    engine_of(engine_name, network).step(random_view(SIZE), 1, DRAWS)
    assert all(p.grad is None and not p.requires_grad for p in network.stem.parameters())


@ENGINES
def test_weight_scales_gradients_and_not_losses(engine_name: str) -> None:
    network, view = network_of(2), random_view(SIZE)
    expected = Oracle(network).step(view.pixels_hwc, 0, DRAWS, weight=0.125)
    result = engine_of(engine_name, network).step(view, 0, DRAWS, weight=0.125)
    assert output_error(result, expected) <= EXACT
    assert gradient_error(gradients_of(network), expected.gradients) <= EXACT


@ENGINES
def test_two_slides_accumulate_to_the_sum(engine_name: str) -> None:
    network, oracle = network_of(2), Oracle(network_of(2))
    total: dict[str, Tensor] = {}
    engine = engine_of(engine_name, network)
    for index, size in enumerate([SIZE, Size(303, 402)]):
        view, draws = random_view(size, seed=index), Draws(5, 1, f"{index}.svs")
        engine.step(view, index, draws, weight=0.5)
        for name, gradient in oracle.step(view.pixels_hwc, index, draws, weight=0.5).gradients.items():
            total[name] = total[name] + gradient if name in total else gradient.clone()
    assert gradient_error(gradients_of(network), total) <= EXACT


def test_a_repeated_step_is_bitwise_the_same() -> None:
    network, view = network_of(), random_view(SIZE)
    engine = streaming(network, 150)
    first = engine.step(view, 1, DRAWS)
    gradients = gradients_of(network)
    network.zero_grad()
    second = engine.step(view, 1, DRAWS)
    assert first.classification_losses == second.classification_losses
    assert first.reconstruction_losses[:3] == second.reconstruction_losses[:3]
    assert all(torch.equal(gradients[name], again) for name, again in gradients_of(network).items())


def test_a_step_leaves_the_global_generators_and_the_weights_alone() -> None:
    network = network_of(2)
    torch_state, before = torch.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}
    numpy_state = repr(np.random.get_state())  # noqa: NPY002
    streaming(network, 150).step(random_view(SIZE), 1, DRAWS)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("tile_px", [1, 150, 4096])
def test_prediction_is_the_network_without_dropout(tile_px: int) -> None:
    network, view = network_of(), random_view(Size(403, 371))
    expected = Oracle(network).step(view.pixels_hwc, 0, DRAWS, dropout=False).probabilities
    found = streaming(network, tile_px).predict(view)
    assert found.dtype == np.float64
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert all(p.grad is None for p in network.parameters())


def test_prediction_differs_from_training_by_dropout() -> None:
    network, view = network_of(), random_view(SIZE)
    engine = streaming(network, 150)
    assert np.abs(engine.predict(view) - engine.step(view, 0, DRAWS).probabilities).max() > 1e-6


def test_observer_sees_features_and_grids() -> None:
    network, view = network_of(), random_view(SIZE)
    expected = Oracle(network).step(view.pixels_hwc, 0, DRAWS)
    engine = streaming(network, 150)
    seen: list[int] = []

    def observe(number: int, x: FeatureStore | None, z_bchw: Tensor) -> None:
        seen.append(number)
        assert (x is None) == (number == 4)
        if x is not None:
            torch.testing.assert_close(x.read(Box.covering(x.size)), expected.features[number], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(z_bchw.detach(), expected.grids[number - 1], rtol=1e-9, atol=1e-11)

    engine.step(view, 0, DRAWS, observer=observe)
    engine.predict(view, observer=observe)
    assert seen == [1, 2, 3, 4, 1, 2, 3, 4]
    seen.clear()
    engine.step(view, 0, DRAWS, stages={2}, observer=observe)
    assert seen == [2]


def test_a_view_that_was_not_padded_is_refused_with_the_size_that_would_do() -> None:
    network = network_of()
    needed = network.padded_size(Size(30, 30))
    with pytest.raises(ConfigError) as caught:
        streaming(network, 96).predict(ArrayView(np.zeros((30, 30, 3), np.float32)))
    assert str(caught.value) == (
        "not a size that the network divides (view of 30x30 pixels): "
        f"pad it with background to network.padded_size(view.size), which is {needed}"
    )


@pytest.mark.parametrize("stages", [[], [0], [1, 9]])
def test_stages_that_are_not_there_are_refused(stages: list[int]) -> None:
    network = network_of()
    with pytest.raises(ConfigError, match="name at least one, counted from 1"):
        streaming(network, 96).step(random_view(SIZE), 1, DRAWS, stages=stages)
    assert not gradients_of(network)


def test_losses_can_be_swapped() -> None:
    network, view = network_of(2), random_view(SIZE)
    network.classification_loss = torch.nn.Module()
    network.classification_loss.forward = lambda logits, label: (logits[label] - 1) ** 2  # type: ignore[method-assign]
    network.reconstruction_loss = torch.nn.MSELoss()
    streamed = streaming(network, 150).step(view, 1, DRAWS)
    gradients = gradients_of(network)
    network.zero_grad()
    reference = whole(network).step(view, 1, DRAWS)
    assert output_error(streamed, reference) <= EXACT
    assert gradient_error(gradients, gradients_of(network)) <= EXACT
    plain = Oracle(network).step(view.pixels_hwc, 1, DRAWS)
    assert output_error(streamed, plain) > 1e-3
