"""Encoders trained on patches: which patches teach, by which gradients, and what is kept when the encoder is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mil_cases import arrays, linear
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from wholeslide.baselines.attention import AttentionMIL
from wholeslide.baselines.bag_cache import BagCache
from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.baselines.patch_learner import PatchLearner, PatchNetwork
from wholeslide.baselines.patch_view import PatchView
from wholeslide.baselines.recurrent import RecurrentMIL
from wholeslide.baselines.registry import PatchRule
from wholeslide.draws import Draws
from wholeslide.slides.augment import Orientation
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.working import open_working_slide
from wholeslide.streaming.execution import Execution

SIDE, WIDTH, COLUMNS, ROWS = 32, 5, 4, 3
COUNT = COLUMNS * ROWS
RANKED, DRAWN = PatchRule(taught=1, highest=3), PatchRule(taught=7)
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
DRAWS = Draws(0, 0, "slide")
MakeView = Callable[..., PatchView]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """An image of twelve patches, each of noise around a colour of its own."""
    rng = np.random.default_rng(0)
    colours = np.kron(rng.uniform(40, 215, (ROWS, COLUMNS, 3)), np.ones((SIDE, SIDE, 1)))
    Image.fromarray((colours + rng.uniform(-40, 40, colours.shape)).astype(np.uint8)).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


def network(rule: PatchRule, classes: int = 2, class_weights: list[float] | None = None) -> PatchNetwork:
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(WIDTH)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 2)
    encoder = PatchEncoder(
        nn.Sequential(nn.Conv2d(3, WIDTH, 5, stride=4), norm, nn.ReLU()),
        patch_px=SIDE,
        pixel_mean=MEAN,
        pixel_std=STD,
        execution=Execution("fp32", channels_last=True),
    )
    aggregator = (RecurrentMIL if rule.ranked else AttentionMIL)(WIDTH, classes)
    return PatchNetwork(encoder, nn.Linear(WIDTH, classes), aggregator, rule, class_weights=class_weights)


def layers(of: PatchNetwork) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Of the encoder."""
    convolution, norm = of.encoder.backbone.get_submodule("0"), of.encoder.backbone.get_submodule("1")
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return convolution, norm


@pytest.fixture
def view_for(slide: Path, tmp_path: Path) -> MakeView:
    caches: dict[PatchNetwork, BagCache] = {}

    def make(of: PatchNetwork, augmentation: AugmentationConfig | None = None) -> PatchView:
        bags = caches.setdefault(of, BagCache(of.encoder, least_tissue=0.5, folder=tmp_path / "kept"))
        config = SlideConfig(mpp="native")
        return PatchView(
            slide,
            lambda: open_working_slide(slide, config),
            bags,
            patch_px=SIDE,
            least_tissue=0.5,
            augmentation=augmentation,
        )

    return make


def patches_of(slide: Path) -> list[np.ndarray]:
    pixels = np.asarray(Image.open(slide).convert("RGB"))
    return [
        pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]


def plainly_encoded(of: PatchNetwork, patches: list[np.ndarray]) -> Tensor:
    """(N, D), by the formulas: pixels of mean 0 and deviation 1, the layers with fixed statistics, the mean over cells."""
    x_nchw = torch.stack([torch.tensor(patch / 255).permute(2, 0, 1) for patch in patches]).float()
    x_nchw = (x_nchw - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    convolution, norm = layers(of)
    x_nchw = F.conv2d(x_nchw, convolution.weight, convolution.bias, stride=4)
    x_nchw = F.batch_norm(x_nchw, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False)
    return F.relu(x_nchw).mean(dim=(2, 3))


def gradients(of: PatchNetwork) -> dict[str, Tensor]:
    return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


def plain_gradients(of: PatchNetwork, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*of.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def test_the_recurrent_network_by_hand() -> None:
    torch.manual_seed(0)
    model = RecurrentMIL(3, 2, state_width=4)
    bag_nd, by_name = torch.randn(3, 3), arrays(model)
    state = np.zeros(4)
    for patch in bag_nd.double().numpy():
        state = np.maximum(0, linear(by_name, "state", state) + linear(by_name, "patch", patch))
    assert model(bag_nd).logits.tolist() == pytest.approx(linear(by_name, "logits", state), rel=1e-5)


def test_ranks_by_hand() -> None:
    two = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.2, 0.8]])
    assert network(RANKED).ranks(two).tolist() == [1, 3, 2, 0]  # by the positive class; equal ones in their order
    three = np.array([[0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.9, 0.0, 0.1], [0.2, 0.3, 0.5]])
    assert network(RANKED, 3).ranks(three).tolist() == [2, 1, 3, 0]  # by the likeliest


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_the_highest_scoring_patch_teaches(classes: int, label: int, slide: Path, view_for: MakeView) -> None:
    weights = [0.5, 2.0, 1.0][:classes]
    model = network(RANKED, classes, class_weights=weights)
    result = PatchLearner(model, torch.device("cpu")).step(view_for(model), label, DRAWS, weight=0.25, stages={1})
    logits_nc = model.patch_classifier(plainly_encoded(model, patches_of(slide)))
    scores_n = torch.softmax(logits_nc, dim=1)[:, 1] if classes == 2 else torch.softmax(logits_nc, dim=1).amax(dim=1)
    first = int(scores_n.argmax())
    loss = weights[label] * F.cross_entropy(logits_nc[first : first + 1], torch.tensor([label]))
    assert result.classification_losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert math.isnan(result.classification_losses[1])
    np.testing.assert_allclose(result.probabilities[0], torch.softmax(logits_nc[first], 0).detach(), rtol=1e-5)
    assert np.isnan(result.probabilities[1]).all()
    torch.testing.assert_close(gradients(model), plain_gradients(model, 0.25 * loss), atol=1e-6, rtol=1e-4)


def test_drawn_patches_teach_by_their_mean(slide: Path, view_for: MakeView) -> None:
    model = network(PatchRule(taught=COUNT))
    PatchLearner(model, torch.device("cpu")).step(view_for(model), 1, DRAWS, stages={1})
    logits_nc = model.patch_classifier(plainly_encoded(model, patches_of(slide)))
    loss = sum(F.cross_entropy(one[None], torch.tensor([1])) for one in logits_nc) / COUNT
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(gradients(model), plain_gradients(model, loss), atol=1e-6, rtol=1e-4)


def test_patches_are_drawn_anew_each_epoch_and_none_twice(view_for: MakeView, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    varied = PatchView.varied

    def noted(self: PatchView, chosen: list[int], draws: Draws) -> object:
        drawn.append(chosen)
        return varied(self, chosen, draws)

    monkeypatch.setattr(PatchView, "varied", noted)
    model = network(DRAWN)
    learner = PatchLearner(model, torch.device("cpu"))
    for draws in (DRAWS, DRAWS, Draws(0, 1, "slide"), Draws(1, 0, "slide"), Draws(0, 0, "other")):
        learner.step(view_for(model), 1, draws, stages={1})
    assert drawn[0] == drawn[1]
    assert len({tuple(chosen) for chosen in drawn}) == 4
    assert all(len(set(chosen)) == 7 and set(chosen) <= set(range(COUNT)) for chosen in drawn)


@pytest.mark.parametrize("rule", [RANKED, DRAWN])
def test_part_2_learns_from_features_alone(rule: PatchRule, slide: Path, view_for: MakeView) -> None:
    model = network(rule)
    PatchLearner(model, torch.device("cpu")).step(view_for(model, AugmentationConfig()), 1, DRAWS, stages={2})
    features_nd = plainly_encoded(model, patches_of(slide)).detach()
    if rule.ranked:
        scores_n = torch.softmax(model.patch_classifier(features_nd), dim=1)[:, 1].tolist()
        features_nd = features_nd[sorted(range(COUNT), key=lambda number: -scores_n[number])[:3]]
    loss = F.cross_entropy(model.aggregator(features_nd).logits[None], torch.tensor([1]))
    found = gradients(model)
    assert all(name.startswith("aggregator.") for name in found)
    torch.testing.assert_close(found, plain_gradients(model, loss), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", [RANKED, DRAWN])
def test_predictions_of_both_parts(rule: PatchRule, slide: Path, view_for: MakeView) -> None:
    model = network(rule)
    learner = PatchLearner(model, torch.device("cpu"))
    found = learner.predict(view_for(model, AugmentationConfig()))
    with torch.no_grad():
        features_nd = plainly_encoded(model, patches_of(slide))
        probabilities_nc = torch.softmax(model.patch_classifier(features_nd), dim=1)
        order = probabilities_nc[:, 1].argsort(descending=True)
        first = probabilities_nc[order[0]] if rule.ranked else probabilities_nc.mean(dim=0)
        second = torch.softmax(model.aggregator(features_nd[order[:3]] if rule.ranked else features_nd).logits, dim=0)
    np.testing.assert_allclose(found, torch.stack([first, second]), rtol=1e-4)
    asked = learner.predict(view_for(model), classifiers=[2])
    assert np.isnan(asked[0]).all()
    np.testing.assert_array_equal(asked[1], found[1])


def test_features_are_kept_when_the_encoder_is_trained_and_not_before(
    view_for: MakeView, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(RANKED)
    learner = PatchLearner(model, torch.device("cpu"))
    before = learner.predict(view_for(model))
    learner.step(view_for(model), 1, DRAWS, stages={1})
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(2)
    after = learner.predict(view_for(model))
    assert not np.allclose(before, after)
    learner.step(view_for(model), 1, DRAWS, stages={2})
    monkeypatch.setattr(PatchEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    view = view_for(model)
    view.prefetch(0)
    np.testing.assert_array_equal(learner.predict(view), after)
    assert view._opened is None, "the slide was opened for nothing"


def test_what_each_part_trains() -> None:
    model = network(RANKED)
    encoder, patch_classifier, aggregator = (
        set(part.parameters()) for part in (model.encoder, model.patch_classifier, model.aggregator)
    )
    assert set(model.backbone_parameters()) == set(model.backbone_parameters(1)) == encoder
    assert model.backbone_parameters(2) == []
    assert set(model.head_parameters(1)) == patch_classifier
    assert set(model.head_parameters(2)) == aggregator
    assert set(model.head_parameters()) == patch_classifier | aggregator
    fixed = PatchNetwork(
        model.encoder, model.patch_classifier, model.aggregator, RANKED, class_weights=None, freeze_norm_affine=True
    )
    convolution, norm = layers(model)
    assert set(fixed.backbone_parameters(1)) == set(convolution.parameters())
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_taught_patches_are_turned_and_coloured_each_by_its_own_draw(slide: Path, view_for: MakeView) -> None:
    model, patches = network(RANKED), patches_of(slide)
    every = list(range(COUNT))
    np.testing.assert_array_equal(view_for(model).varied(every, DRAWS), np.stack(patches))
    turned_nhwc = view_for(model, AugmentationConfig(jitter=0)).varied(every, DRAWS)
    ways = [Orientation(mirrored, turns) for mirrored in (False, True) for turns in range(4)]
    found = [
        [number for number, way in enumerate(ways) if np.array_equal(way.apply(patch), turned)]
        for patch, turned in zip(patches, turned_nhwc, strict=True)
    ]
    assert all(len(numbers) == 1 for numbers in found)
    assert len({numbers[0] for numbers in found}) > 3
    coloured_nhwc = view_for(model, AugmentationConfig(flips=False, turns=False, jitter=0.2)).varied(every, DRAWS)
    shifts = [(coloured - patch).mean() for coloured, patch in zip(coloured_nhwc, patches, strict=True)]
    assert all(0.1 < abs(shift) < 120 for shift in shifts)
    assert np.std(shifts) > 1
    again = view_for(model, AugmentationConfig()).varied(every[3:], DRAWS)
    np.testing.assert_array_equal(view_for(model, AugmentationConfig()).varied(every[3:], DRAWS), again)
    assert not np.array_equal(view_for(model, AugmentationConfig()).varied(every[3:], Draws(0, 1, "slide")), again)
