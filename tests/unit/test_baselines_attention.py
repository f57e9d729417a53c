"""Attention pooling, gated or not, on cases that are computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wholeslide.baselines.attention import AttentionMIL


def filled(module: AttentionMIL, weights: dict[str, tuple[list[list[float]], list[float]]]) -> AttentionMIL:
    with torch.no_grad():
        for name, (weight, bias) in weights.items():
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    return module


@pytest.mark.parametrize("gated", [False, True])
def test_two_patches_by_hand(gated: bool) -> None:
    """One attention unit, three classes: each number is worked out below from the formula alone."""
    model = filled(
        AttentionMIL(2, 3, gated=gated, width=2, attention_width=1),
        {
            "embedding": ([[1.0, 0.0], [0.0, -1.0]], [0.0, 0.5]),
            "attention.tanh": ([[1.0, 0.0]], [0.0]),
            **({"attention.gate": ([[0.0, 1.0]], [-0.5])} if gated else {}),
            "attention.score": ([[2.0]], [0.25]),
            "logits": ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.0, 0.1, -1.0]),
        },
    )
    output = model(torch.tensor([[1.0, 0.0], [-3.0, -1.0]]))
    embedded = [(1.0, 0.5), (0.0, 1.5)]  # relu(x), relu(0.5 - y)
    gates = [1 / (1 + math.exp(-(second - 0.5))) for _, second in embedded]
    scores = [2 * math.tanh(first) * gate + 0.25 for (first, _), gate in zip(embedded, gates, strict=True)]
    if not gated:
        scores = [2 * math.tanh(first) + 0.25 for first, _ in embedded]
    assert scores == pytest.approx([2 * math.tanh(1) * (0.5 if gated else 1) + 0.25, 0.25])
    share = math.exp(scores[0]) / (math.exp(scores[0]) + math.exp(scores[1]))
    pooled = (share, 0.5 * share + 1.5 * (1 - share))
    assert output.attention_bn[0].tolist() == pytest.approx([share, 1 - share])
    logits = [pooled[0], pooled[1] + 0.1, sum(pooled) - 1]
    assert output.logits.tolist() == pytest.approx(logits)
    loss, again = model.loss(torch.tensor([[1.0, 0.0], [-3.0, -1.0]]), 1)
    exponentials = [math.exp(logit) for logit in logits]
    assert loss.item() == pytest.approx(-math.log(exponentials[1] / sum(exponentials)))
    assert model.probabilities(again).tolist() == pytest.approx([value / sum(exponentials) for value in exponentials])


def test_the_order_of_patches_does_not_matter_and_each_counts() -> None:
    torch.manual_seed(0)
    model, bag = AttentionMIL(512, 4, gated=True), torch.randn(9, 512)
    turned = model(bag.flip(0))
    output = model(bag)
    torch.testing.assert_close(turned.logits, output.logits)
    torch.testing.assert_close(turned.attention_bn, output.attention_bn.flip(1))
    assert output.attention_bn.sum().item() == pytest.approx(1)
    assert not torch.allclose(model(bag[:8]).logits, output.logits)


def test_one_patch_has_all_attention() -> None:
    output = AttentionMIL(8, 2, gated=True, width=4, attention_width=3)(torch.randn(1, 8))
    assert output.attention_bn[0].tolist() == [1.0]


def test_its_widths_are_the_papers() -> None:
    shapes = {name: tuple(p.shape) for name, p in AttentionMIL(512, 2, gated=True).named_parameters() if p.dim() > 1}
    assert shapes == {
        "embedding.weight": (512, 512),
        "attention.tanh.weight": (128, 512),
        "attention.gate.weight": (128, 512),
        "attention.score.weight": (1, 128),
        "logits.weight": (2, 512),
    }
