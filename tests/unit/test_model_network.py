"""The network as a whole: seeds, frozen parts, padding, losses, and the lists of its parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wholeslide.errors import ConfigError
from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import CrossEntropy, LocalNetwork, build_network
from wholeslide.verify import redraw_weights


def build(
    backbone: str = "resnet10t",
    stages: int = 2,
    *,
    seed: int = 0,
    class_weights: list[float] | None = None,
    **config: Any,
) -> LocalNetwork:
    return build_network(
        ModelConfig(backbone=backbone, stages=stages, weights="random", **config),
        classes=2,
        pixel_mean=(0.4, 0.5, 0.6),
        pixel_std=(0.1, 0.2, 0.3),
        seed=seed,
        class_weights=class_weights,
    )


def test_a_seed_decides_every_weight_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = build(seed=4).state_dict()
    torch.manual_seed(2)
    again, other = build(seed=4).state_dict(), build(seed=5).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["heads.0.to_grid.weight"], other["heads.0.to_grid.weight"])
    assert not torch.equal(first["stages.0.body.layer1.0.conv1.weight"], other["stages.0.body.layer1.0.conv1.weight"])


def test_global_generators_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    build()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002


def test_the_stem_is_frozen_and_the_rest_learns() -> None:
    network = build()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad != name.startswith("stem."), name


@pytest.mark.parametrize("backbone", ["resnet10t", "test_convnext", "mobilenetv2_035"])
def test_affine_parameters_of_the_norms_freeze_on_request(backbone: str) -> None:
    network = build(backbone, freeze_norm_affine=True)
    norms = [m for m in network.stages.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms
    frozen = {id(p) for norm in norms for p in norm.parameters()}
    for name, parameter in network.named_parameters():
        if not name.startswith("stem."):
            assert parameter.requires_grad == (id(parameter) not in frozen), name
    listed = {id(p) for p in [*network.backbone_parameters(), *network.head_parameters()]}
    assert not listed & frozen


def test_lists_of_parameters_hold_each_trainable_one_once() -> None:
    network = build(stages=4)
    every = [*network.backbone_parameters(), *network.head_parameters()]
    assert len({id(p) for p in every}) == len(every)
    assert {id(p) for p in every} == {id(p) for p in network.parameters() if p.requires_grad}
    for lists in (network.backbone_parameters, network.head_parameters):
        assert [id(p) for k in range(1, 5) for p in lists(k)] == [id(p) for p in lists()]
    decoder = network.decoder(2)
    assert decoder is not None
    assert {id(p) for p in decoder.parameters()} <= {id(p) for p in network.head_parameters(2)}


def test_parts_of_each_stage() -> None:
    network = build("resnet34", 4)
    assert [network.head(k).kernel for k in (1, 2, 3, 4)] == [9, 9, 7, 5]
    assert [network.head(k).hidden.out_features for k in (1, 2, 3, 4)] == [128, 128, 128, 512]
    decoders = [network.decoder(k) for k in (1, 2, 3)]
    assert [d.stride for d in decoders if d is not None] == [1, 2, 2]
    assert [d.to_target.out_channels for d in decoders if d is not None] == [64, 64, 128]
    assert network.decoder(4) is None


def test_without_reconstruction_there_are_no_decoders() -> None:
    network = build(stages=4, reconstruction=False)
    assert [network.decoder(k) for k in (1, 2, 3, 4)] == [None] * 4
    assert not any(name.startswith("decoders") for name, _ in network.named_parameters())


def test_one_stage_has_only_the_final_classifier() -> None:
    network = build(stages=1)
    assert network.depth == len(network.heads) == 1
    assert network.head(1).kernel == 5
    assert network.decoder(1) is None


def test_pixels_are_normalised_by_the_training_tissue() -> None:
    pixels = np.tile(np.array([0.5, 0.5, 0.9], np.float32), (2, 3, 1))
    x = build().to_input(pixels)
    assert x.shape == (1, 3, 2, 3)
    assert x[0, :, 1, 2].tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)
    assert x.stride() == (2 * 3 * 3, 1, 3 * 3, 3)  # channels last, the batch's stride included


def test_state_holds_the_normalisation_and_the_class_weights() -> None:
    state = build(class_weights=[0.5, 2.0]).state_dict()
    assert state["pixel_mean"].tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert state["pixel_std"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert state["classification_loss.class_weights"].tolist() == [0.5, 2.0]


def test_cross_entropy_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4."""
    logits = torch.tensor([0.0, math.log(3)])
    assert CrossEntropy()(logits, 0).item() == pytest.approx(math.log(4))
    assert CrossEntropy([0.5, 2.0])(logits, 0).item() == pytest.approx(0.5 * math.log(4))
    assert CrossEntropy([0.5, 2.0])(logits, 1).item() == pytest.approx(2 * math.log(4 / 3))


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("backbone", ["resnet10t", "test_convnext", "efficientnet_lite0"])
def test_padding_gives_every_grid_two_cells_and_never_crops(backbone: str, stages: int) -> None:
    network = build(backbone, stages)
    for size in (Size(1, 1), Size(32, 33), Size(40, 250), Size(500, 41), Size(700, 623)):
        padded = network.padded_size(size)
        assert padded.width >= size.width
        assert padded.height >= size.height
        for number in range(1, stages + 1):
            cells, head = network.feature_size(padded, number), network.head(number)
            assert head.grid_length(cells.width) * head.grid_length(cells.height) >= 2
        assert network.padded_size(padded) == padded


def test_a_low_view_is_padded_along_the_axis_that_gives_no_cell() -> None:
    """ConvNeXt's patches do not pad: 20 pixels give no cell of 32, however wide the view is."""
    padded = build("test_convnext", 1).padded_size(Size(500, 20))
    assert padded == Size(500, 32)


def test_a_sufficient_size_is_not_padded() -> None:
    assert build().padded_size(Size(701, 623)) == Size(701, 623)


def test_padding_of_a_small_slide_is_the_least_of_its_longer_side() -> None:
    """ResNet with first stride 3 has cells of 48 px and grid cells of 240: 241 px are two of them."""
    assert build().padded_size(Size(40, 33)) == Size(241, 33)
    assert build().padded_size(Size(33, 40)) == Size(33, 241)


@pytest.mark.parametrize("size", [Size(700, 623), Size(33, 700), Size(170, 193), Size(673, 673)])
def test_lite0_views_are_one_beyond_a_multiple_of_32(size: Size) -> None:
    padded = build("efficientnet_lite0").padded_size(size)
    assert padded.width % 32 == padded.height % 32 == 1
    assert padded.width - size.width < 32
    assert padded.height - size.height < 32


@pytest.mark.parametrize("stride", [0, -1])
def test_first_stride_below_one_is_refused(stride: int) -> None:
    with pytest.raises(ConfigError) as caught:
        build(first_stride=stride)
    assert str(caught.value) == f"{stride} is too small (--first-stride): give 1 or more"


@pytest.mark.parametrize(("backbone", "first_stride"), [("resnet10t", 3), ("test_convnext", None)])
def test_a_classifiers_field_is_what_its_grid_depends_on(backbone: str, first_stride: int | None) -> None:
    network = build(backbone, 2, first_stride=first_stride).double().eval()
    redraw_weights(network, seed=0)
    for number in (1, 2):
        reach = network.classifier_reach(number).x
        side = 4 * reach.stride + 2 * reach.field
        pixels = torch.rand(1, 3, 8 * network.reach(number).stride, side, dtype=torch.float64, requires_grad=True)
        x = network.stem(pixels)
        for stage in range(1, number + 1):
            x = network.stage(stage)(x)
        column = -(-reach.before // reach.stride) + 1  # its field begins inside
        network.head(number).grid(x)[:, :, 0, column].sum().backward()
        assert pixels.grad is not None
        felt = pixels.grad.abs().sum(dim=(0, 1, 2)).nonzero().ravel()
        assert (int(felt[0]), int(felt[-1])) == (
            column * reach.stride - reach.before,
            column * reach.stride + reach.after,
        )
        assert reach.field == int(felt[-1] - felt[0]) + 1
