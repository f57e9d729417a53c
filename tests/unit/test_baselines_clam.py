"""CLAM on cases that numpy computes from the published formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mil_cases import arrays, bag, cross_entropy, linear, sigmoid, small, softmax

from wholeslide.baselines.clam import CLAM

FEATURES, CLASSES = 4, 3


def smooth_svm(scores: np.ndarray, labels: list[int]) -> float:
    """The mean over patches of log sum_j exp(s_j + [j is not y] - s_y)."""
    losses = [
        np.log(sum(np.exp(score + (j != y) - row[y]) for j, score in enumerate(row)))
        for row, y in zip(scores, labels, strict=True)
    ]
    return float(np.mean(losses))


def by_hand(
    w: dict[str, np.ndarray], patches: np.ndarray, label: int, *, multi: bool, instances: int, subtyping: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Logits, attention and loss."""
    embedded = np.maximum(linear(w, "embedding.0", patches), 0)
    gated = np.tanh(linear(w, "attention.tanh", embedded)) * sigmoid(linear(w, "attention.gate", embedded))
    attention = softmax(linear(w, "attention.score", gated).T)
    pooled = attention @ embedded
    if multi:
        logits = np.concatenate([linear(w, f"logits.{c}", pooled[c]) for c in range(CLASSES)])
    else:
        logits = linear(w, "logits.0", pooled[0])
    half = len(patches) / 2
    most, least = min(instances, int(np.ceil(half))), min(instances, int(half))
    losses = []
    for c in range(CLASSES):
        order = np.argsort(-attention[c if multi else 0])
        if c == label:
            chosen = [*order[:most], *order[len(order) - least :]]
            assert len(set(chosen)) == len(chosen), "a patch is taught both"
            losses.append(smooth_svm(linear(w, f"instance_logits.{c}", embedded[chosen]), [1] * most + [0] * least))
        elif subtyping:
            losses.append(smooth_svm(linear(w, f"instance_logits.{c}", embedded[order[:most]]), [0] * most))
    instance_loss = sum(losses) / (CLASSES if subtyping else 1)
    return logits, attention, 0.7 * cross_entropy(logits, label) + 0.3 * instance_loss


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("name", ["clam-sb", "clam-mb"])
def test_bags_of_all_sizes_by_hand(name: str, subtyping: bool) -> None:
    """From one patch on: fewer than sixteen give half of them to each end."""
    model = small(name, FEATURES, CLASSES, subtyping=subtyping).double().eval()
    for count in (*range(1, 21), 40):
        patches = bag(count, FEATURES, seed=count).double()
        label = count % CLASSES
        logits, attention, expected = by_hand(
            arrays(model), patches.numpy(), label, multi=name == "clam-mb", instances=8, subtyping=subtyping
        )
        loss, output = model.loss(patches, label)
        np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-12)
        assert output.attention_bn is not None
        np.testing.assert_allclose(
            output.attention_bn.detach().numpy(), attention[: len(output.attention_bn)], atol=1e-12
        )
        assert loss.item() == pytest.approx(expected, rel=1e-10), count


def test_one_unit_by_hand() -> None:
    """Without any array: two patches, one unit of attention, two classes; 1 patch at each end."""
    model = CLAM(1, 2, width=1, attention_width=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        for layer in (model.embedding[0], model.attention.score, model.logits[0], *model.instance_logits):
            layer.bias.fill_(0.0)
    loss, output = model.loss(torch.tensor([[2.0], [-1.0]], dtype=torch.float64), 0)
    # embedded are 2 and 0, so that attention sees 3 and 1
    scores = [math.tanh(x) / (1 + math.exp(-x)) for x in (3, 1)]
    share = 1 / (1 + math.exp(scores[1] - scores[0]))
    assert output.attention_bn is not None
    assert output.attention_bn[0].tolist() == pytest.approx([share, 1 - share])
    assert output.logits.tolist() == pytest.approx([2 * share] * 2)
    # both classes tie, for the slide and, with the margin of one, for each patch
    assert loss.item() == pytest.approx(0.7 * math.log(2) + 0.3 * math.log(1 + math.e))


def test_only_the_true_class_is_taught_unless_classes_exclude_each_other() -> None:
    for subtyping in (False, True):
        model = small("clam-mb", FEATURES, CLASSES, subtyping=subtyping)
        model.loss(bag(20, FEATURES), 1)[0].backward()
        taught = [layer.weight.grad is not None for layer in model.instance_logits]  # type: ignore[union-attr]
        assert taught == [subtyping, True, subtyping]


def test_its_widths_are_published() -> None:
    shapes = {name: tuple(p.shape) for name, p in CLAM(512, 3, branches="classes").named_parameters() if p.dim() > 1}
    assert shapes == {
        "embedding.0.weight": (512, 512),
        "attention.tanh.weight": (256, 512),
        "attention.gate.weight": (256, 512),
        "attention.score.weight": (3, 256),
        **{f"logits.{c}.weight": (1, 512) for c in range(3)},
        **{f"instance_logits.{c}.weight": (2, 512) for c in range(3)},
    }
    assert {name: p.shape for name, p in CLAM(512, 3).named_parameters()}["logits.0.weight"] == (3, 512)
    assert CLAM(512, 3).embedding[2].p == 0.25
