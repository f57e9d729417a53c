"""Which operations are local, and how a refusal names its layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.errors import ModelError
from wholeslide.model.config import ModelConfig
from wholeslide.model.locality import Locality
from wholeslide.model.network import build_network
from wholeslide.model.tracing import locality_of, trace


def build(backbone: str, stages: int = 2) -> None:
    build_network(
        ModelConfig(backbone=backbone, stages=stages, weights="random"),
        classes=2,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.2,) * 3,
        seed=0,
    )


@pytest.mark.parametrize(
    ("backbone", "layer", "operation"),
    [
        ("seresnet50", "layer1.0.se", "mean"),
        ("convnextv2_atto", "stages.0.blocks.0.mlp.grn", "norm"),
        ("efficientnet_b0", "blocks.0.0.se", "mean"),
        ("regnety_002", "s1.b1.se", "mean"),
        ("resnet50_gn", "bn1", "GroupNorm"),
        ("vit_tiny_patch16_224", "patch_embed", "getattr"),
    ],
)
def test_a_backbone_that_looks_further_is_refused_by_its_layers_name(backbone: str, layer: str, operation: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(backbone)
    (problem,) = caught.value.problems
    assert problem.what == f"not a local operation: {operation}"
    assert problem.where == f"backbone {backbone}, layer {layer}"
    assert problem.remedy.startswith("choose a backbone of local operations, for example resnet34")


def test_a_backbone_that_cannot_be_traced_is_refused() -> None:
    """Its padding is computed from the image's size."""
    with pytest.raises(
        ModelError, match=r"the backbone cannot be traced: .* \(tf_efficientnet_lite0\): choose a backbone"
    ):
        build("tf_efficientnet_lite0")


def test_an_unknown_backbone_is_answered_with_its_neighbours() -> None:
    with pytest.raises(ModelError, match=r"timm knows no such backbone \(resnet35\): choose for example .*resnet34"):
        build("resnet35")


@pytest.mark.parametrize("stages", [9, 100])
def test_more_stages_than_blocks_are_refused(stages: int) -> None:
    with pytest.raises(ModelError) as caught:
        build("resnet18", stages)
    assert str(caught.value) == (
        f"cannot cut 8 blocks into {stages} stages (backbone resnet18): choose --stages between 1 and 8"
    )


class Traceable(nn.Module):
    """A network of one operation, in the form that timm's have."""

    def __init__(self, operation: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def forward_features(self, x: Tensor) -> Tensor:
        y: Tensor = self.operation(x)
        return y


def locality(operation: nn.Module | Callable[[Tensor], Tensor]) -> Locality:
    return locality_of(trace(Traceable(operation), "net"), "net")


@pytest.mark.parametrize(
    "operation",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.LayerNorm([4, 8, 8]),
        nn.LayerNorm(8),  # over the width, where channels come first
        nn.Linear(8, 8),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.Upsample(scale_factor=2),
        nn.Dropout(0.1),
        DropPath(0.1),
        nn.Softmax(dim=1),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda operation: type(operation).__name__,
)
def test_layers_that_are_not_local(operation: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"backbone net"):
        locality(operation)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x * x.mean(),
        lambda x: x.flatten(2),
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: x.permute(0, 3, 2, 1),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x.roll(1, 2),
        lambda x: x[:, :, 1:],
    ],
)
def test_functions_that_are_not_local(operation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"not a local operation"):
        locality(operation)


def test_a_parameter_that_varies_over_the_positions_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(shape))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    with pytest.raises(ModelError, match="varies over the positions"):
        locality(Positions(1, 4, 8, 8))
    with pytest.raises(ModelError, match="varies over the positions"):
        locality(Positions(4))  # broadcasts along the width
    assert locality(Positions(1, 4, 1, 1)) == Locality()


@pytest.mark.parametrize(
    "operation",
    [
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Dropout(0.0),
        nn.Conv2d(4, 4, 1),
        lambda x: torch.cat([x, F.relu(x)], dim=1),
        lambda x: x * torch.sigmoid(x),
        lambda x: x + 1,
        lambda x: F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ],
)
def test_pointwise_operations_reach_nowhere(operation: nn.Module | Callable[[Tensor], Tensor]) -> None:
    found = locality(operation)
    assert (found.x.before, found.x.after, found.stride) == (0, 0, 1)


def test_linear_layers_are_local_where_channels_come_last() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            return y

    assert locality(Pointwise()) == Locality()


def test_drop_path_inside_a_backbone_is_refused_by_name() -> None:
    backbone = timm.create_model("convnext_atto", num_classes=0, global_pool="", drop_path_rate=0.2)
    with pytest.raises(ModelError) as caught:
        locality_of(trace(backbone, "convnext_atto"), "convnext_atto")
    (problem,) = caught.value.problems
    assert problem.what == "not a local operation: random depth or dropout inside the backbone"
    assert problem.where == "backbone convnext_atto, layer stages.0.blocks.1.drop_path"
