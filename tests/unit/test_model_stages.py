"""How a backbone is cut, and that the pieces joined are the backbone."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wholeslide.geometry import Size
from wholeslide.model.config import ModelConfig
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.stages import Stage, balanced_partition, paper_partition


def build(backbone: str, stages: int, **config: Any) -> LocalNetwork:
    return build_network(
        ModelConfig(backbone=backbone, stages=stages, weights="random", **config),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )


def blocks_of(stage: Stage) -> list[str]:
    """Names of the blocks whose weights a stage holds, in order."""
    found = (
        re.match(r"body\.((layer\d+\.\d+)|(stages\.\d+\.blocks\.\d+)|(blocks\.\d+\.\d+)|(s\d+\.b\d+))\.", key)
        for key in stage.state_dict()
    )
    return list(dict.fromkeys(match[1] for match in found if match))


PAPER = {
    1: ["1.0 1.1 1.2 2.0 2.1 2.2 2.3 3.0 3.1 3.2 3.3 3.4 3.5 4.0 4.1 4.2"],
    2: ["1.0 1.1 1.2 2.0 2.1", "2.2 2.3 3.0 3.1 3.2 3.3 3.4 3.5 4.0 4.1 4.2"],
    4: ["1.0 1.1", "1.2 2.0 2.1", "2.2 2.3 3.0 3.1 3.2", "3.3 3.4 3.5 4.0 4.1 4.2"],
    8: ["1.0", "1.1", "1.2", "2.0 2.1", "2.2 2.3", "3.0 3.1 3.2", "3.3 3.4 3.5", "4.0 4.1 4.2"],
}
STRIDES = {
    1: [6, 48],
    2: [6, 12, 48],
    4: [6, 6, 12, 24, 48],
    8: [6, 6, 6, 6, 12, 12, 24, 24, 48],
}


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_resnet34_is_cut_as_in_the_paper(stages: int) -> None:
    network = build("resnet34", stages)
    cut = [" ".join(name.removeprefix("layer") for name in blocks_of(network.stage(k))) for k in range(1, stages + 1)]
    assert cut == PAPER[stages]
    assert [network.stem.stride, *(network.stage(k).stride for k in range(1, stages + 1))] == STRIDES[stages]


def test_the_paper_has_no_other_cuts() -> None:
    assert [stages for stages in range(20) if paper_partition(stages)] == [1, 2, 4, 8]
    assert build("resnet34", 3).depth == 3


def test_first_stride() -> None:
    assert [build("resnet18", 1, first_stride=stride).stem.stride for stride in (1, 2, 3)] == [2, 4, 6]
    assert build("test_convnext", 1).stem.stride == 4


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.integers(0, 30), min_size=1, max_size=9), data=st.data())
def test_balanced_partition_is_the_best_of_all(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))

    def largest(borders: tuple[int, ...]) -> int:
        edges = (0, *borders, len(costs))
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

    lengths = balanced_partition(costs, parts)
    assert len(lengths) == parts
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1
    best = min(largest(borders) for borders in itertools.combinations(range(1, len(costs)), parts - 1))
    assert largest(tuple(itertools.accumulate(lengths[:-1]))) == best


FAMILIES = [
    ("resnet18", 3),
    ("resnet34", 4),
    ("resnet50", 4),
    ("resnet34d", 3),
    ("convnext_atto", 4),
    ("efficientnet_lite0", 5),
    ("mobilenetv2_100", 6),
    ("regnetx_002", 4),
    ("regnetx_032", 2),
    ("densenet121", 2),
]
LARGE = ["convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny", "convnext_small", "convnext_base"]


def assert_joined_pieces_are_the_backbone(name: str, stages: int) -> None:
    network = build(name, stages)
    options = {"bn_eps": 1e-3} if name == "efficientnet_lite0" else {}
    backbone = timm.create_model(name, num_classes=0, global_pool="", **options).eval()
    if name.startswith("resnet"):
        next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)).stride = (3, 3)
    pieces = [network.stem, *(network.stage(number) for number in range(1, stages + 1))]
    weights: dict[str, torch.Tensor] = {}
    for piece in pieces:
        own = piece.body.state_dict()
        assert not weights.keys() & own.keys(), "a weight is in two pieces"
        weights.update(own)
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.startswith("head.") for key in missing), missing
    x = torch.rand((1, 3, 75, 97), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = backbone.forward_features(x)
        for number, piece in enumerate(pieces):
            x = piece(x)
            size = network.feature_size(Size(97, 75), number)
            assert x.shape[1:] == (piece.out_channels, size.height, size.width)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("name", "stages"), FAMILIES)
def test_joined_pieces_are_the_backbone_bit_by_bit(name: str, stages: int) -> None:
    assert_joined_pieces_are_the_backbone(name, stages)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_joined_pieces_of_a_large_backbone(name: str) -> None:
    assert_joined_pieces_are_the_backbone(name, 4)


def test_every_number_of_stages_up_to_that_of_the_blocks() -> None:
    for stages in range(1, 10):
        network = build("test_convnext", stages)
        assert sum(len(blocks_of(network.stage(k))) for k in range(1, stages + 1)) == 9
        assert all(blocks_of(network.stage(k)) for k in range(1, stages + 1))


def test_downsampling_belongs_to_the_block_behind_it() -> None:
    """A stage of ConvNeXt never ends in the channels and the stride of the next."""
    network = build("test_convnext", 9)
    for number in range(1, 10):
        keys = network.stage(number).state_dict()
        for key in keys:
            if ".downsample." in key:
                assert f"{key.split('.downsample.')[0]}.blocks.0.conv_dw.weight" in keys
    assert [network.stage(k).stride for k in range(1, 10)] == [4, 8, 8, 16, 16, 16, 16, 32, 32]


def test_the_stem_ends_before_the_first_block_and_the_tail_follows_the_last() -> None:
    network = build("efficientnet_lite0", 16)
    assert {key.split(".")[1] for key in network.stem.state_dict()} == {"conv_stem", "bn1"}
    assert {"conv_head", "bn2"} <= {key.split(".")[1] for key in network.stage(16).state_dict()}
    resnet = build("resnet18", 8)
    assert {key.split(".")[1] for key in resnet.stem.state_dict()} == {"conv1", "bn1"}


def test_a_name_with_a_tag_is_cut_like_its_architecture() -> None:
    network = build("resnet34.a1_in1k", 4)
    assert blocks_of(network.stage(1)) == ["layer1.0", "layer1.1"]


def test_stages_never_leave_evaluation_mode() -> None:
    network = build("resnet18", 2)
    network.train()
    assert network.training
    assert not any(m.training for piece in (network.stem, *network.stages) for m in piece.modules())
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    network.stage(1)(network.stem(torch.rand(1, 3, 64, 64)))
    assert before
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
