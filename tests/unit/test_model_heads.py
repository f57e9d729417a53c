"""The classifier of a stage on examples that are computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from wholeslide.model.heads import (
    AttentionClassifier,
    Moments,
    auxiliary_classifier,
    final_classifier,
    head_kernel,
)


@pytest.mark.parametrize(("stride", "kernel"), [(1, 9), (6, 9), (12, 9), (13, 7), (24, 7), (25, 5), (48, 5), (96, 5)])
def test_kernel_follows_the_stride(stride: int, kernel: int) -> None:
    assert head_kernel(stride) == kernel


def test_auxiliary_classifier_is_sized_by_channels_and_stride() -> None:
    head = auxiliary_classifier(64, 24, classes=3, dropout=0.2)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "to_grid.weight": (64, 64, 7, 7),
        "norm.weight": (64,),
        "norm.bias": (64,),
        "attention_tanh.weight": (32, 64),
        "attention_tanh.bias": (32,),
        "attention_gate.weight": (32, 64),
        "attention_gate.bias": (32,),
        "attention_score.weight": (1, 32),
        "hidden.weight": (128, 64),
        "hidden.bias": (128,),
        "logits.weight": (3, 128),
        "logits.bias": (3,),
    }
    assert head.norm.num_groups == 64
    assert head.dropout == 0.2


def test_final_classifier() -> None:
    head = final_classifier(512, classes=2, dropout=0.2)
    assert head.kernel == 5
    assert head.attention_tanh.out_features == 128
    assert head.hidden.out_features == 512
    assert head.logits.out_features == 2


@torch.no_grad()
def tiny_head(dropout: float = 0.5) -> AttentionClassifier:
    """One channel, 1x1 grid cells; attention scores tanh(h)·sigmoid(0)·2 = tanh(h); logits (pooled, -pooled)."""
    head = AttentionClassifier(1, kernel=1, attention_hidden=1, hidden=1, classes=2, dropout=dropout).double()
    for parameter in head.parameters():
        parameter.zero_()
    head.to_grid.weight.fill_(1)
    head.norm.weight.fill_(1)
    head.attention_tanh.weight.fill_(1)
    head.attention_score.weight.fill_(2)
    head.hidden.weight.fill_(1)
    head.logits.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    return head


def test_two_cells_by_hand() -> None:
    """z = (0, 2): mean 1, variance 1; behind norm and ReLU h = (0, 1/√(1 + 1e-5)); the scores are (0, tanh h)."""
    head = tiny_head()
    output = head([torch.tensor([[0.0], [2.0]], dtype=torch.float64)])
    h = 1 / math.sqrt(1 + 1e-5)
    attention = math.exp(math.tanh(h)) / (1 + math.exp(math.tanh(h)))
    assert output.attention_n.tolist() == pytest.approx([1 - attention, attention], abs=1e-14)
    assert output.logits.tolist() == pytest.approx([attention * h, -attention * h], abs=1e-14)


def test_dropout_takes_weights_away_and_scales_the_rest() -> None:
    head = tiny_head(dropout=0.2)
    z, count = torch.tensor([[0.0], [2.0]]).double(), torch.ones(2).double()
    whole = head([z]).logits
    assert torch.allclose(head([z], count, torch.tensor([1.0, 1.0]).double()).logits, whole / 0.8)
    # The first cell's feature is zero.
    assert torch.allclose(head([z], count, torch.tensor([0.0, 1.0]).double()).logits, whole / 0.8)
    assert torch.equal(head([z], count, torch.tensor([1.0, 0.0]).double()).logits, torch.zeros(2, dtype=torch.float64))


def test_a_row_that_stands_for_several_cells_is_those_cells() -> None:
    head = auxiliary_classifier(6, 12, classes=2, dropout=0.2).double()
    z = torch.randn(7, 6).double()
    kept = torch.tensor([1, 0, 1, 1, 1, 0, 1]).double()
    alike = z[[0, 1, 2, 3, 4, 4, 4]].requires_grad_()
    together = z[:5].clone().requires_grad_()
    expected = head([alike], None, kept)
    found = head([together], torch.tensor([1, 1, 1, 1, 3]).double(), torch.tensor([1, 0, 1, 1, 2]).double())
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.attention_n, expected.attention_n[:5])
    (expected_gradient,) = torch.autograd.grad(expected.logits[0], alike)
    (gradient,) = torch.autograd.grad(found.logits[0], together)
    torch.testing.assert_close(gradient[:4], expected_gradient[:4])
    torch.testing.assert_close(gradient[4], expected_gradient[4:].sum(dim=0))


def test_the_moments_are_those_of_a_group_norm_with_one_group_a_channel() -> None:
    head = auxiliary_classifier(6, 12, classes=2, dropout=0).double()
    z = torch.randn(12, 6).double()
    _, mean, variance = Moments.of_rows([z[:5], z[5:]], torch.ones(12).double())
    by_torch = head.norm(z.T.reshape(1, 6, 4, 3))[0].flatten(1).T
    torch.testing.assert_close((z - mean) * (variance + head.norm.eps).rsqrt(), by_torch)


def test_the_gradients_that_moments_send_on_are_those_of_autograd() -> None:
    parts = [torch.randn(rows, 3).double().requires_grad_() for rows in (4, 1, 7)]
    count, outer = torch.rand(12).double() + 0.5, torch.randn(2, 3).double()
    moments = Moments.of_rows(parts, count)
    expected = torch.autograd.grad([moments.mean_c, moments.variance_c], parts, list(outer))
    leaves = moments.leaves()
    leaves.mean_c.grad, leaves.variance_c.grad = outer
    for found, wanted in zip(leaves.gradients(parts), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_parts_change_nothing() -> None:
    head = auxiliary_classifier(6, 12, classes=2, dropout=0.2).double()
    z, count = torch.randn(50, 6).double(), torch.rand(50).double() + 0.5
    kept = (torch.rand(50) > 0.2).double()
    found = []
    for rows in (50, 7):
        leaf = z.clone().requires_grad_()
        output = head(leaf.split(rows), count, kept)
        gradients = torch.autograd.grad(output.logits[0], [leaf, *head.attention_tanh.parameters()])
        found.append([output.logits, output.attention_n, *gradients])
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, whole)


@pytest.mark.parametrize("kernel", [5, 7, 9])
def test_no_cell_is_dropped_at_the_right_and_the_bottom(kernel: int) -> None:
    """x is padded with zeros to a multiple of the kernel; a change of any cell changes the grid."""
    head = AttentionClassifier(2, kernel=kernel, attention_hidden=2, hidden=2, classes=2, dropout=0)
    x = torch.randn(1, 2, kernel + 1, 2 * kernel - 1)
    grid = head.grid(x)
    assert grid.shape[-2:] == (2, 2) == (head.grid_length(kernel + 1), head.grid_length(2 * kernel - 1))
    padded = F.pad(x, (0, 1, 0, kernel - 1))
    assert torch.allclose(grid, F.conv2d(padded, head.to_grid.weight, stride=kernel), atol=1e-6)
    corner = x.clone()
    corner[:, :, -1, -1] += 1
    assert not torch.allclose(head.grid(corner)[..., -1, -1], grid[..., -1, -1])


def test_a_multiple_of_the_kernel_is_not_padded() -> None:
    head = AttentionClassifier(1, kernel=3, attention_hidden=1, hidden=1, classes=2, dropout=0)
    assert head.grid(torch.randn(1, 1, 6, 9)).shape[-2:] == (2, 3)


def test_the_gradient_of_the_grids_weights_lies_in_memory_as_they_do() -> None:
    """Otherwise adding it to what is there takes seven times as long."""
    head = final_classifier(6, classes=2, dropout=0.0).to(memory_format=torch.channels_last)
    x = torch.randn(1, 6, 10, 15).contiguous(memory_format=torch.channels_last)
    weight = head.to_grid.weight
    upstream = torch.randn(1, 6, 2, 3)
    (gradient,) = torch.autograd.grad(head.grid(x), [weight], upstream)
    (expected,) = torch.autograd.grad(torch.conv2d(x, weight, stride=5), [weight], upstream)
    assert gradient.stride() == weight.stride()
    torch.testing.assert_close(gradient, expected)


def test_attention_sums_to_one() -> None:
    head = auxiliary_classifier(6, 12, classes=2, dropout=0.2)
    count = torch.tensor([1.0, 1.0, 5.0])
    output = head([torch.randn(3, 6)], count)
    assert (count @ output.attention_n).item() == pytest.approx(1, abs=1e-6)
