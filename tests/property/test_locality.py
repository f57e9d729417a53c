"""The interval algebra of locality against brute force on random stacks of layers.

Brute force puts an infinity into one column (or row) of the input: weights and inputs are positive, so that it travels along
every path and nothing cancels, and the outputs that are not finite are exactly those that depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.errors import ModelError
from wholeslide.geometry import Size
from wholeslide.model.locality import AxisLocality, Locality, Sampling, compose
from wholeslide.model.tracing import locality_of, trace


class Traceable(nn.Module):
    """Has the name of method that a timm network has."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward_features(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class Joined(nn.Module):
    """Two branches that meet cell by cell, or channel beside channel."""

    def __init__(self, left: nn.Module, right: nn.Module, *, concatenated: bool) -> None:
        super().__init__()
        self.left, self.right, self.concatenated = left, right, concatenated
        self.merge = conv(1) if not concatenated else conv(1, channels=2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        met = torch.cat([left, right], dim=1) if self.concatenated else F.relu(left + right)
        merged: Tensor = self.merge(met)
        return merged


def conv(kernel: Any, *, stride: int = 1, padding: Any = 0, dilation: Any = 1, channels: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(channels, 1, kernel, stride=stride, padding=padding, dilation=dilation, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


@st.composite
def convolutions(draw: st.DrawFn, stride: int | None = None) -> nn.Module:
    """Both axes differ in everything but the stride."""
    kernels = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    dilations = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    paddings = tuple(draw(st.integers(0, d * (k - 1))) for k, d in zip(kernels, dilations, strict=True))
    return conv(
        kernels, stride=draw(st.integers(1, 3)) if stride is None else stride, padding=paddings, dilation=dilations
    )


@st.composite
def poolings(draw: st.DrawFn) -> nn.Module:
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    padding, ceil_mode = draw(st.integers(0, kernel // 2)), draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, stride, padding, dilation=draw(st.integers(1, 2)), ceil_mode=ceil_mode)
    return nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=draw(st.booleans()))


@st.composite
def residuals(draw: st.DrawFn) -> nn.Module:
    """Branches of equal length: odd kernels that keep it or halve it, two even kernels in a row, a pooled shortcut."""
    concatenated = draw(st.booleans())
    kind = draw(st.sampled_from(["odd", "even", "strided", "pooled"]))
    half, dilation = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    odd = 2 * half + 1
    if kind == "odd":
        body: nn.Module = nn.Sequential(
            conv(odd, padding=half * dilation, dilation=dilation), nn.ReLU(), conv(3, padding=1)
        )
        return Joined(body, nn.Identity(), concatenated=concatenated)
    if kind == "even":
        body = nn.Sequential(conv(2 * half + 2, padding=half + 1), conv(2 * half + 2, padding=half))
        return Joined(nn.Identity(), body, concatenated=concatenated)
    stride = draw(st.integers(1, 3)) if kind == "strided" else 2
    body = nn.Sequential(conv(odd, stride=stride, padding=half), conv(3, padding=1))
    shortcut: nn.Module = conv(1, stride=stride)
    if kind == "pooled":
        shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), conv(1))
    return Joined(body, shortcut, concatenated=concatenated)


stacks = st.lists(st.one_of(convolutions(), poolings(), residuals()), min_size=1, max_size=4)


def locality(layers: list[nn.Module]) -> Locality:
    return locality_of(trace(Traceable(nn.Sequential(*layers)), "stack"), "stack")


@torch.no_grad()
def dependents(layers: list[nn.Module], size: Size, axis: str) -> Tensor:
    """``[i, j]``: output ``j`` along an axis depends on input ``i`` along it."""
    length = size.width if axis == "x" else size.height
    images = 0.5 + torch.rand((length, 1, size.height, size.width), dtype=torch.float64)
    for i in range(length):
        if axis == "x":
            images[i, 0, :, i] = torch.inf
        else:
            images[i, 0, i, :] = torch.inf
    infinite = ~torch.isfinite(nn.Sequential(*layers)(images)[:, 0])
    return infinite.any(dim=1) if axis == "x" else infinite.any(dim=2)


def roomy_length(axis: AxisLocality) -> int:
    """The shortest input with an output whose whole reach lies inside."""
    return -(-axis.before // axis.stride) * axis.stride + axis.after + 1


@settings(max_examples=80, deadline=None)
@given(layers=stacks, spare=st.integers(-12, 12))
def test_reach_is_what_brute_force_finds(layers: list[nn.Module], spare: int) -> None:
    found = locality(layers)
    for name, axis, other in (("x", found.x, found.y), ("y", found.y, found.x)):
        length, other_length = max(1, roomy_length(axis) + spare), roomy_length(other)
        assume(axis.output_length(length) > 0)
        size = Size(length, other_length) if name == "x" else Size(other_length, length)
        influences = dependents(layers, size, name)
        assert influences.shape[1] == axis.output_length(length)
        for j in range(influences.shape[1]):
            inputs = influences[:, j].nonzero()[:, 0].tolist()
            first, last = j * axis.stride - axis.before, j * axis.stride + axis.after
            assert all(first <= i <= last for i in inputs), "an output depends on more than the algebra says"
            if first >= 0 and last < length:
                assert (min(inputs), max(inputs)) == (first, last), "the hull is not tight"


@settings(max_examples=60, deadline=None)
@given(layers=stacks, length=st.integers(1, 60))
def test_output_length_is_pytorchs(layers: list[nn.Module], length: int) -> None:
    expected = locality(layers).output_size(Size(length, 47))
    assume(expected.area > 0)
    with torch.no_grad():
        output = nn.Sequential(*layers)(torch.ones((1, 1, 47, length), dtype=torch.float64))
    assert (expected.width, expected.height) == (output.shape[-1], output.shape[-2])


@settings(max_examples=40, deadline=None)
@given(layers=stacks, cut=st.integers(0, 4))
def test_parts_compose_to_the_whole(layers: list[nn.Module], cut: int) -> None:
    assume(cut <= len(layers))
    parts = [locality(part) for part in (layers[:cut], layers[cut:]) if part]
    assert compose(parts) == locality(layers)


def test_nothing_composes_to_itself() -> None:
    assert compose([]) == Locality()
    one = Locality().then(Sampling(3, 2, 1), Sampling(5, 2, 2))
    assert compose([Locality(), one, Locality()]) == one


@given(before=st.integers(0, 50), after=st.integers(-3, 50), stride=st.integers(1, 9))
def test_halo_is_the_least_whole_number_of_strides(before: int, after: int, stride: int) -> None:
    axis = AxisLocality(stride, before, after)
    early, late = axis.halo_before, axis.halo_after
    # Output 0 reads down to -before, output n - 1 up to (n - 1)·stride + after; the window ends before (n + late)·stride.
    assert early * stride >= before
    assert early == 0 or (early - 1) * stride < before
    assert late * stride - 1 >= after - stride
    assert late == 0 or (late - 1) * stride - 1 < after - stride


@dataclass
class WorkedExample:
    name: str
    layers: list[nn.Module]
    expected: tuple[int, int, int]


WORKED = [
    WorkedExample("one 3x3", [conv(3, padding=1)], (1, 1, 1)),
    WorkedExample(
        "a stem: 7x7 stride 3, pooling 3 stride 2", [conv(7, stride=3, padding=3), nn.MaxPool2d(3, 2, 1)], (6, 6, 6)
    ),
    WorkedExample("an even kernel looks further to the right", [conv(4, padding=1)], (1, 1, 2)),
    WorkedExample("two of them", [conv(4, padding=1), conv(4, padding=1)], (1, 2, 4)),
    WorkedExample("stride without overlap", [conv(1, stride=3)], (3, 0, 0)),
    WorkedExample("dilation", [conv(3, padding=2, dilation=2), conv(3, stride=2, padding=1)], (2, 3, 3)),
]


@pytest.mark.parametrize("example", WORKED, ids=lambda example: example.name)
def test_worked_examples(example: WorkedExample) -> None:
    axis = locality(example.layers).x
    assert (axis.stride, axis.before, axis.after) == example.expected


def test_axes_are_not_exchanged() -> None:
    found = locality([conv((3, 7), padding=(0, 6))])
    assert (found.x.before, found.x.after) == (6, 0)
    assert (found.y.before, found.y.after) == (0, 2)


def test_branches_of_different_stride_are_refused() -> None:
    crossed = Joined(conv(3, stride=2, padding=1), nn.MaxPool2d(1, 1), concatenated=False)
    with pytest.raises(ModelError, match="feature maps of different stride or layout meet"):
        locality([crossed])


@st.composite
def strided_paths(draw: st.DrawFn, strides: tuple[int, ...]) -> AxisLocality:
    axis = AxisLocality()
    for stride in strides:
        kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, kernel // 2))
        axis = axis.then(Sampling(kernel, stride, padding, dilation, ceil_mode=draw(st.booleans())))
    return axis


@settings(max_examples=200, deadline=None)
@given(data=st.data(), strides=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
def test_branches_agree_in_size_if_they_do_so_at_every_length(data: st.DataObject, strides: tuple[int, ...]) -> None:
    one, other = data.draw(strided_paths(strides)), data.draw(strided_paths(strides))
    reach = max(axis.before + axis.after for axis in (one, other)) + one.stride
    everywhere = all(one.output_length(n) == other.output_length(n) for n in range(reach, reach + 7 * one.stride))
    assert one.agrees_in_size(other) == everywhere == other.agrees_in_size(one)


def test_branches_that_differ_by_a_cell_at_odd_sizes_are_refused() -> None:
    """They would meet at some slides and fail at others."""
    crossed = Joined(conv(3, stride=2, padding=1), nn.AvgPool2d(2, 2), concatenated=False)
    with pytest.raises(ModelError, match="differ by a cell at some image sizes"):
        locality([crossed])
