"""What the engine says of each place equals autograd on the whole slide, in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import DRAWS, build, painted, random_view, streaming
from oracle import Oracle
from torch import Tensor

from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming import heat
from wholeslide.streaming.heat import StageHeat

EXACT = 1e-6  # maps are float32
SIZE = Size(611, 573)


def expected_evidence(oracle: Oracle, features: Tensor, number: int) -> np.ndarray:
    """x_k times the gradient of each logit with respect to it, summed over channels."""
    x = features.clone().requires_grad_()
    logits = oracle._classify(oracle._grid(x, number), number, None)
    gradients = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in logits]
    return torch.stack([(x * gradient).sum(1)[0] for gradient in gradients]).detach().numpy()


def expected_attention(network: LocalNetwork, z: Tensor, number: int) -> np.ndarray:
    head = network.head(number)
    with torch.no_grad():
        normed = torch.relu(
            torch.nn.functional.group_norm(z, z.shape[1], head.norm.weight, head.norm.bias, head.norm.eps)
        )
        cells = normed[0].flatten(1).T
        gated = torch.tanh(head.attention_tanh(cells)) * torch.sigmoid(head.attention_gate(cells))
        return torch.softmax(head.attention_score(gated)[:, 0], 0).reshape(z.shape[-2:]).numpy()


def assert_equal(found: list[StageHeat], network: LocalNetwork, pixels: np.ndarray) -> None:
    oracle = Oracle(network)
    step = oracle.step(pixels, 1, DRAWS, dropout=False)
    assert [one.number for one in found] == list(range(1, network.depth + 1))
    for one, features, z in zip(found, step.features[1:], step.grids, strict=True):
        evidence = expected_evidence(oracle, features, one.number)
        scale = np.abs(evidence).max()
        assert scale > 0
        assert one.evidence_px == network.stage(one.number).stride
        assert one.attention_px == one.evidence_px * network.head(one.number).kernel
        assert np.abs(one.evidence_chw - evidence).max() <= EXACT * scale
        np.testing.assert_allclose(one.attention_hw, expected_attention(network, z, one.number), rtol=1e-5)
        np.testing.assert_allclose(one.probabilities_c, step.probabilities[one.number - 1], atol=1e-9)


@pytest.mark.parametrize("case", ["in memory", "on disk", "disc", "pieces", "none", "one tile"])
def test_attention_and_evidence(case: str) -> None:
    view = painted(case, SIZE) if case in ("disc", "pieces", "none") else random_view(SIZE)
    network = build("resnet_tiny", 3).double()
    engine = streaming(network, 2000 if case == "one tile" else 150, store="disk" if case == "on disk" else "host")
    assert_equal(list(engine.explain(view)), network, view.pixels_hwc)
    assert all(p.grad is None for p in network.parameters())
    assert any(p.requires_grad for p in network.head(1).parameters())


def test_evidence_of_cells_adds_up_to_that_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slide too large for a value a cell gets one for each cell of the grid."""
    view, network = painted("disc", SIZE), build("resnet_tiny", 3).double()
    engine = streaming(network, 150)
    fine = list(engine.explain(view))
    monkeypatch.setattr(heat, "MOST_CELLS", 1)
    for one, coarse in zip(fine, engine.explain(view), strict=True):
        kernel = network.head(one.number).kernel
        assert coarse.evidence_px == one.evidence_px * kernel == coarse.attention_px
        height, width = coarse.attention_hw.shape
        padded = np.zeros((3, height * kernel, width * kernel))
        padded[:, : one.evidence_chw.shape[1], : one.evidence_chw.shape[2]] = one.evidence_chw
        summed = padded.reshape(3, height, kernel, width, kernel).sum(axis=(2, 4))
        np.testing.assert_allclose(coarse.evidence_chw, summed, atol=1e-5 * np.abs(summed).max())


def test_it_says_what_prediction_says() -> None:
    view, network = painted("disc", SIZE), build("resnet_tiny", 4).double()
    engine = streaming(network, 150)
    predicted = engine.predict(view)
    explained = np.stack([one.probabilities_c for one in engine.explain(view)])
    np.testing.assert_allclose(explained, predicted, atol=1e-12)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(explained))
