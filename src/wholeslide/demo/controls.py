"""Two classifiers that cannot see the arrangement, and must therefore fail on the demonstration's slides.

If either succeeded, the classes would differ in something else than the arrangement, and the whole-slide network's
success would prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from wholeslide.baselines.patches import patch_boxes
from wholeslide.demo.arrangement import ARRANGEMENTS, PATCH_PX
from wholeslide.demo.cohort import draw_pairs
from wholeslide.demo.staining import RgbImage
from wholeslide.geometry import Size

TISSUE_PX = (600, 680)
"""Sides of the controls' tissues: the same arrangements on smaller slides, so that there can be many."""
_FOLDS = 5
_COLOUR_BINS = 32
_COMPONENTS = 32
_EPOCHS = 30
_BATCH = 16
_BAG = 400
"""Patches of a slide that are drawn for one step of training; all of them are used for prediction."""

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Control:
    """A control's AUROC over ``slides`` slides, each predicted by a model that saw neither it nor its twin."""

    name: str
    slides: int
    auroc: float


@dataclass(frozen=True)
class ControlSlides:
    """What the controls are given: per slide a colour histogram ``(bins,)`` and its patches ``(patches, components)``.

    ``labels`` (0 or 1) and ``pairs`` have an entry a slide.
    """

    histograms: Features
    bags: list[Features]
    labels: NDArray[np.int64]
    pairs: NDArray[np.int64]


def run_controls(seed: int, *, pairs: int = 104) -> list[Control]:
    """Cross-validate both controls on freshly drawn slides, the two slides of a pair always in one fold."""
    slides = describe_slides(*render_small(seed, pairs=pairs), seed=seed)
    return [
        Control("logistic regression on colour histograms", 2 * pairs, histogram_auroc(slides)),
        Control(f"attention pooling over {PATCH_PX} px patches", 2 * pairs, patch_auroc(slides, seed=seed)),
    ]


def render_small(seed: int, *, pairs: int) -> tuple[list[RgbImage], list[int], list[int]]:
    """Images, labels and numbers of the pairs; the draws are others than those of the cohort with the same seed."""
    images, labels, numbers = [], [], []
    for number, specimen in enumerate(draw_pairs(pairs, seed=seed + 10_000, tissue_px=TISSUE_PX)):
        for arrangement, image in specimen.render().items():
            images.append(image)
            labels.append(ARRANGEMENTS.index(arrangement))
            numbers.append(number)
    return images, labels, numbers


def describe_slides(images: list[RgbImage], labels: list[int], pairs: list[int], *, seed: int) -> ControlSlides:
    """Histograms, and patches as principal components of their pixels (found without the labels)."""
    rng = np.random.default_rng(seed)
    pixels = [_patches(image) for image in images]
    sample = np.concatenate([rng.choice(patches, 50) for patches in pixels])
    components = make_pipeline(PCA(_COMPONENTS, random_state=seed), StandardScaler()).fit(sample)
    return ControlSlides(
        histograms=np.stack([_histogram(image) for image in images]),
        bags=[components.transform(patches).astype(np.float32) for patches in pixels],
        labels=np.array(labels),
        pairs=np.array(pairs),
    )


def histogram_auroc(slides: ControlSlides) -> float:
    """AUROC of logistic regression on the histograms, by cross-validation grouped by pair."""
    scores = np.empty(len(slides.labels))
    for fit, held_out in _folds(slides):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model.fit(slides.histograms[fit], slides.labels[fit])
        scores[held_out] = model.decision_function(slides.histograms[held_out])
    return float(roc_auc_score(slides.labels, scores))


def patch_auroc(slides: ControlSlides, *, seed: int) -> float:
    """AUROC of gated attention pooling over the patches, by cross-validation grouped by pair."""
    scores = np.empty(len(slides.labels))
    for fold, (fit, held_out) in enumerate(_folds(slides)):
        model = _fit_attention(slides, fit, seed=seed * _FOLDS + fold)
        with torch.no_grad():
            scores[held_out] = [model(torch.from_numpy(slides.bags[i])[None]).item() for i in held_out]
    return float(roc_auc_score(slides.labels, scores))


def _folds(slides: ControlSlides) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return list(GroupKFold(_FOLDS).split(slides.labels, groups=slides.pairs))


def _histogram(image: RgbImage) -> Features:
    """Share of the pixels in each of 32 bins of red, green and blue, ``(96,)``."""
    bins = (image.reshape(-1, 3) // (256 // _COLOUR_BINS)).T
    counts = [np.bincount(channel, minlength=_COLOUR_BINS) for channel in bins]
    return (np.concatenate(counts) / bins.shape[1]).astype(np.float32)


def _patches(image: RgbImage) -> Features:
    """``(patches, 3 * PATCH_PX ** 2)`` in [0, 1]: the image cut along a grid that covers it."""
    boxes = patch_boxes(Size(image.shape[1], image.shape[0]), PATCH_PX)
    return (np.stack([image[box.rows_columns] for box in boxes]).reshape(len(boxes), -1) / 255).astype(np.float32)


class _AttentionPooling(nn.Module):
    """Gated attention pooling of bags ``(slides, patches, components)`` to a logit each ``(slides,)`` (Ilse 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(_COMPONENTS, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.value = nn.Linear(64, 32)
        self.gate = nn.Linear(64, 32)
        self.score = nn.Linear(32, 1, bias=False)
        self.classify = nn.Linear(64, 1)

    def forward(self, bags: Tensor) -> Tensor:
        instances = self.embed(bags)
        scores = self.score(torch.tanh(self.value(instances)) * torch.sigmoid(self.gate(instances)))
        logits: Tensor = self.classify((torch.softmax(scores, dim=1) * instances).sum(dim=1)).squeeze(1)
        return logits


def _fit_attention(slides: ControlSlides, fit: NDArray[np.int64], *, seed: int) -> _AttentionPooling:
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AttentionPooling()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    for _ in range(_EPOCHS):
        order = rng.permutation(fit)
        for batch in np.split(order, range(_BATCH, len(order), _BATCH)):
            bags = torch.from_numpy(np.stack([rng.choice(slides.bags[i], _BAG) for i in batch]))
            target = torch.from_numpy(slides.labels[batch]).float()
            loss = nn.functional.binary_cross_entropy_with_logits(model(bags), target)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return model
