"""A cohort in which one patch of a slide decides is learnt within seconds by every method that can find it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mil_cases import small
from sklearn.metrics import roc_auc_score

from wholeslide.baselines.aggregator import Aggregator

FEATURES, PATCHES = 8, 9
TRAINED, TESTED = 240, 80
"""Slides. Of 80, TransMIL learns the training slides by heart, and nothing else."""
SIGNS = ([5.0, 0, 0, 0, 0, 0, 0, 0], [0, 5.0, 0, 0, 0, 0, 0, 0])
"""What one patch of a slide of each class shows."""
EXACT: dict[str, dict[str, Any]] = {"transmil": {"landmarks": 32}}
"""Attention without approximation, which is quicker for so few patches."""


def cohort(slides_count: int, seed: int, *, decided: bool = True) -> list[tuple[torch.Tensor, int]]:
    """Bags of noise, each with one patch at a random place that shows the sign of its class."""
    generator = torch.Generator().manual_seed(seed)
    slides = []
    for number in range(slides_count):
        patches = torch.randn(PATCHES, FEATURES, generator=generator)
        if decided:
            place = int(torch.randint(PATCHES, (1,), generator=generator))
            patches[place] += torch.tensor(SIGNS[number % 2])
        slides.append((patches, number % 2))
    return slides


def train(model: Aggregator, slides: list[tuple[torch.Tensor, int]]) -> None:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=2e-3)
    for _ in range(5):
        for at in range(0, len(slides), 4):
            optimizer.zero_grad()
            torch.stack([model.loss(patches, label)[0] for patches, label in slides[at : at + 4]]).mean().backward()
            optimizer.step()


@torch.no_grad()
def auroc(model: Aggregator, slides: list[tuple[torch.Tensor, int]]) -> float:
    model.eval()
    scores = [model.probabilities(model(patches))[1].item() for patches, _ in slides]
    return float(roc_auc_score([label for _, label in slides], scores))


@pytest.mark.parametrize("name", ["max", "abmil", "gabmil", "clam-sb", "clam-mb", "dsmil", "transmil"])
def test_one_patch_that_decides_is_found(name: str) -> None:
    model = small(name, FEATURES, 2, **EXACT.get(name, {}))
    train(model, cohort(TRAINED, 1))
    found = auroc(model, cohort(TESTED, 2))
    assert found >= 0.95, found


def test_noise_teaches_nothing() -> None:
    """The same training where no patch decides: the score above is not the cohort's own doing."""
    model = small("gabmil", FEATURES, 2)
    train(model, cohort(TRAINED, 1, decided=False))
    assert auroc(model, cohort(TESTED, 2)) < 0.8


@pytest.mark.parametrize("name", ["gabmil", "clam-sb", "dsmil"])
def test_attention_goes_to_the_patch_that_decides(name: str) -> None:
    model = small(name, FEATURES, 2)
    train(model, cohort(TRAINED, 1))
    hits = []
    for patches, label in cohort(TESTED, 2):
        attention_bn = model.eval()(patches).attention_bn
        assert attention_bn is not None
        branch = attention_bn[label if len(attention_bn) > 1 else 0]
        hits.append(int(branch.argmax()) == int(patches[:, label].argmax()))
    assert np.mean(hits) > 0.6, np.mean(hits)
