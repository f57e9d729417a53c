"""DSMIL on cases that numpy computes from the published formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mil_cases import arrays, bag, linear, sigmoid, small, softmax

from wholeslide.baselines.dsmil import DSMIL


def binary_cross_entropy(logits: np.ndarray, label: int) -> float:
    truth = np.eye(len(logits))[label]
    p = sigmoid(logits)
    return float(-np.mean(truth * np.log(p) + (1 - truth) * np.log(1 - p)))


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_by_hand(classes: int, count: int) -> None:
    model = small("dsmil", 4, classes, query_width=3).double()
    patches = bag(count, 4, seed=count).double()
    w, x = arrays(model), patches.numpy()
    scores = linear(w, "instance_logits", x)
    queries = np.tanh(linear(w, "query.2", np.maximum(linear(w, "query.0", x), 0)))
    attention = np.stack([softmax(queries @ queries[scores[:, c].argmax()] / np.sqrt(3)) for c in range(classes)])
    embedding = attention @ x  # of the slide, one row a class
    kernel = w["logits.weight"]  # each output sees all classes' embeddings
    logits = np.array([(kernel[c] * embedding).sum() for c in range(classes)]) + w["logits.bias"]
    for label in range(classes):
        loss, output = model.loss(patches, label)
        np.testing.assert_allclose(output.logits.detach().numpy(), logits, atol=1e-12)
        assert output.attention_bn is not None
        np.testing.assert_allclose(output.attention_bn.detach().numpy(), attention, atol=1e-12)
        expected = binary_cross_entropy(logits, label) / 2 + binary_cross_entropy(scores.max(axis=0), label) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(model.probabilities(output).numpy(), sigmoid(logits) / sigmoid(logits).sum(), atol=1e-12)


def test_only_the_highest_scoring_patch_teaches_the_scores() -> None:
    model = small("dsmil", 4, 2)
    patches = bag(6, 4).requires_grad_()
    model.instance_logits(patches).amax(dim=0).sum().backward()
    taught = (patches.grad != 0).any(dim=1).nonzero()[:, 0].tolist()  # type: ignore[union-attr]
    assert set(taught) == set(model.instance_logits(patches).argmax(dim=0).tolist())


def test_its_widths_are_published() -> None:
    shapes = {name: tuple(p.shape) for name, p in DSMIL(512, 3).named_parameters() if p.dim() > 1}
    assert shapes == {
        "instance_logits.weight": (3, 512),
        "query.0.weight": (128, 512),
        "query.2.weight": (128, 128),
        "logits.weight": (3, 3, 512),
    }


def test_a_class_that_is_sure_to_be_absent_has_no_share() -> None:
    output = DSMIL(2, 3)(torch.zeros(1, 2))._replace(logits=torch.tensor([0.0, 0.0, -60.0]))
    assert DSMIL(2, 3).probabilities(output).tolist() == pytest.approx([0.5, 0.5, 0.0])
