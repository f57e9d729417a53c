"""What the tests of classifiers of bags share: small ones of every method, and the formulas in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from wholeslide.baselines.aggregator import Aggregator
from wholeslide.baselines.registry import method_info

SMALL: dict[str, dict[str, Any]] = {
    "max": {},
    "average": {},
    "abmil": {"width": 16, "attention_width": 8},
    "gabmil": {"width": 16, "attention_width": 8},
    "clam-sb": {"width": 16, "attention_width": 8},
    "clam-mb": {"width": 16, "attention_width": 8},
    "dsmil": {"query_width": 8},
    "transmil": {"width": 16, "heads": 2, "landmarks": 8},
    "mil-rnn": {"state_width": 8},
}
"""Options that make each method small."""
WITH_ATTENTION = {"abmil": 1, "gabmil": 1, "clam-sb": 1, "clam-mb": 3, "dsmil": 3, "transmil": 1}
"""Branches of attention where there are three classes."""


def small(name: str, features: int, classes: int, seed: int = 0, **options: Any) -> Aggregator:
    """A small classifier of the method, with random weights."""
    info = method_info(name)
    torch.manual_seed(seed)
    made = info.load()(features, classes, **{**info.options, **SMALL[name], **options})
    assert isinstance(made, Aggregator)
    return made


def bag(count: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Every parameter by its name, in float64."""
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    exponentials = np.exp(x)
    return np.asarray(exponentials / exponentials.sum(axis=axis, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def cross_entropy(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[label])


def linear(weights: dict[str, np.ndarray], layer: str, x: np.ndarray) -> np.ndarray:
    return np.asarray(x @ weights[f"{layer}.weight"].T + weights.get(f"{layer}.bias", 0.0))
