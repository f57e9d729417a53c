"""What a run's ``--method`` decides: the network, what it sees of a slide, and what trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from wholeslide.baselines.bag_cache import BagCache
from wholeslide.baselines.bag_learner import BagLearner, BagNetwork, BagView
from wholeslide.baselines.encoder import PatchEncoder, build_encoder
from wholeslide.baselines.feature_files import check_width, read_bag
from wholeslide.baselines.patch_learner import PatchLearner, PatchNetwork
from wholeslide.baselines.patch_view import PatchView
from wholeslide.baselines.registry import Kind, method_info
from wholeslide.cohort.files import is_feature_file
from wholeslide.draws import Draws
from wholeslide.errors import FeatureError
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.model.staged import StagedNetwork
from wholeslide.slides.config import SlideConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.plan import Plan
from wholeslide.train.config import TrainConfig
from wholeslide.train.learner import Learner, Source
from wholeslide.train.views import Entry, ViewSource, open_slide_of


@dataclass(frozen=True)
class Tissue:
    """Statistics of the training split's tissue, in [0, 1]: mean and deviation of red, green and blue; mean grey."""

    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    mean_grey: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML."""
        return {"pixel_mean": list(self.pixel_mean), "pixel_std": list(self.pixel_std), "mean_grey": self.mean_grey}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tissue:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError, TypeError: the values are none of it.
        """
        return cls(tuple(values["pixel_mean"]), tuple(values["pixel_std"]), values["mean_grey"])


@dataclass(frozen=True)
class Subject:
    """What a network is built for.

    ``classes`` is their number, ``class_weights`` are the factors on their losses, if any. Where slides are files of features,
    those are ``feature_width`` wide and there is no ``tissue``.
    """

    classes: int
    class_weights: Sequence[float] | None
    tissue: Tissue | None
    feature_width: int | None = None


class Method(Protocol):
    """A kind of method. ``plans`` says whether its memory is planned."""

    plans: bool

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> StagedNetwork:
        """The network as it is before training; only its structure where not ``pretrained``.

        Raises:
            ModelError: there is no such network, or its weights are not found.
        """

    def settled(self, config: TrainConfig, network: StagedNetwork) -> TrainConfig:
        """The options of a new run, with what was measured for them and is kept in no plan."""

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> Learner[Any]:
        """What trains the network and predicts with it."""

    def source(
        self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig, kept: Path | None
    ) -> Source[Any]:
        """How slides are opened for it; ``slides`` says how they are read, ``kept`` where what is made of them may be kept."""


class StagesMethod:
    """Stages over the whole slide, streamed: locally supervised ones, or one from end to end."""

    plans = True

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> LocalNetwork:
        assert subject.tissue is not None
        return build_network(
            config.model_config(),
            classes=subject.classes,
            pixel_mean=subject.tissue.pixel_mean,
            pixel_std=subject.tissue.pixel_std,
            seed=config.seed,
            class_weights=subject.class_weights,
            pretrained=pretrained,
        )

    def settled(self, config: TrainConfig, network: StagedNetwork) -> TrainConfig:
        return config

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> StreamingEngine:
        assert isinstance(network, LocalNetwork)
        assert plan is not None
        return StreamingEngine(network, plan, device, store_folder=config.store_dir)

    def source(
        self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig, kept: Path | None
    ) -> ViewSource:
        assert isinstance(network, LocalNetwork)
        assert subject.tissue is not None
        return ViewSource(
            slides, network.padded_size, config.cache, config.augmentation_config(), subject.tissue.mean_grey
        )


class BagsMethod:
    """A classifier of the features of a slide's patches, which come from files or from an encoder that is not trained."""

    plans = False

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> BagNetwork:
        info, encoder, width = method_info(config.method), None, subject.feature_width
        if width is None:
            encoder, width = built_encoder(config, subject, pretrained=pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            aggregator = info.load()(width, subject.classes, **info.options)
        return BagNetwork(aggregator, encoder, subject.class_weights)

    def settled(self, config: TrainConfig, network: StagedNetwork) -> TrainConfig:
        assert isinstance(network, BagNetwork)
        return config if network.encoder is None else replace(config, precision=network.encoder.execution.precision)

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> BagLearner:
        assert isinstance(network, BagNetwork)
        return BagLearner(network, device)

    def source(
        self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig, kept: Path | None
    ) -> BagSource:
        assert isinstance(network, BagNetwork)
        cache = None
        if network.encoder is not None:
            cache = BagCache(network.encoder, least_tissue=config.least_tissue, folder=kept)
        return BagSource(slides, config.cache, cache, subject.feature_width)


@dataclass(frozen=True)
class BagSource:
    """Opens slides as bags: files of features as they are, slides by the ``bags`` of an encoder.

    ``cache`` is that of prepared slides; ``feature_width`` is given where files of features are trained on.
    """

    slide_config: SlideConfig
    cache: Path | None
    bags: BagCache | None
    feature_width: int | None

    def open(self, entry: Entry, draws: Draws | None = None) -> BagView:
        """A slide's bag. Nothing is drawn: every epoch sees the same features.

        Raises:
            SlideError: the file cannot be read or used.
            FeatureError: likewise.
        """
        if self.bags is None:
            bag = read_bag(entry.path)
            check_width(bag, self.feature_width, entry.path)
        else:
            _refuse_features(entry)
            bag = self.bags.bag(entry.path, lambda: open_slide_of(entry, self.slide_config, self.cache))
        return BagView(bag)


class PatchesMethod:
    """An encoder that is trained on patches of slides, and then a classifier of a slide's features."""

    plans = False

    def network(self, config: TrainConfig, subject: Subject, *, pretrained: bool) -> PatchNetwork:
        info = method_info(config.method)
        encoder, width = built_encoder(config, subject, pretrained=pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            patch_classifier = nn.Linear(width, subject.classes)
            aggregator = info.load()(width, subject.classes, **info.options)
        return PatchNetwork(
            encoder,
            patch_classifier,
            aggregator,
            info.patches,
            class_weights=subject.class_weights,
            freeze_norm_affine=config.freeze_norm_affine,
        )

    def settled(self, config: TrainConfig, network: StagedNetwork) -> TrainConfig:
        assert isinstance(network, PatchNetwork)
        return replace(config, precision=network.encoder.execution.precision)

    def learner(
        self, config: TrainConfig, network: StagedNetwork, plan: Plan | None, device: torch.device
    ) -> PatchLearner:
        assert isinstance(network, PatchNetwork)
        return PatchLearner(network, device)

    def source(
        self, config: TrainConfig, subject: Subject, network: StagedNetwork, slides: SlideConfig, kept: Path | None
    ) -> PatchSource:
        assert isinstance(network, PatchNetwork)
        assert subject.tissue is not None
        bags = BagCache(network.encoder, least_tissue=config.least_tissue, folder=kept)
        return PatchSource(slides, config, bags, subject.tissue.mean_grey)


@dataclass(frozen=True)
class PatchSource:
    """Opens slides as patches; ``bags`` keep their features once the encoder is trained.

    ``mean_grey`` is the training tissue's, in [0, 1].
    """

    slide_config: SlideConfig
    config: TrainConfig
    bags: BagCache
    mean_grey: float

    def open(self, entry: Entry, draws: Draws | None = None) -> PatchView:
        """A slide's patches. What is drawn is drawn by whoever trains on them.

        Raises:
            FeatureError: it is a file of features.
        """
        _refuse_features(entry)
        return PatchView(
            entry.path,
            lambda: open_slide_of(entry, self.slide_config, self.config.cache),
            self.bags,
            patch_px=self.config.patch,
            least_tissue=self.config.least_tissue,
            augmentation=self.config.augmentation_config(),
            mean_grey=self.mean_grey,
        )


def _refuse_features(entry: Entry) -> None:
    if is_feature_file(entry.path):
        what, remedy = "a file of features, where the run has an encoder of its own", "give the slide itself"
        raise FeatureError.single(what, where=str(entry.path), remedy=remedy)


def built_encoder(config: TrainConfig, subject: Subject, *, pretrained: bool) -> tuple[PatchEncoder, int]:
    """What makes features of patches, normalised by the training tissue, and how wide they are.

    Raises:
        ModelError: there is no such backbone, or its weights are not found.
    """
    options = config.encoder_config()
    encoder = build_encoder(
        options if pretrained else replace(options, weights="random"),
        pixel_mean=None if subject.tissue is None else subject.tissue.pixel_mean,
        pixel_std=None if subject.tissue is None else subject.tissue.pixel_std,
        device=torch.device("cpu"),
        seed=config.seed,
    )
    return encoder, encoder.encode(np.zeros((1, config.patch, config.patch, 3), np.uint8)).shape[1]


_KINDS: dict[Kind, Method] = {"stages": StagesMethod(), "bags": BagsMethod(), "patches": PatchesMethod()}


def method_of(config: TrainConfig) -> Method:
    """The kind of a run's method."""
    return _KINDS[method_info(config.method).kind]
