"""What the loops of training, validation and prediction need of a method, whatever it is."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch

from wholeslide.baselines.heat import PatchHeat
from wholeslide.draws import Draws
from wholeslide.model.staged import StagedNetwork
from wholeslide.streaming.heat import StageHeat
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.step import StepResult
from wholeslide.train.prefetch import View
from wholeslide.train.views import Entry

V_contra = TypeVar("V_contra", bound=View, contravariant=True)
V_co = TypeVar("V_co", bound=View, covariant=True)


class Learner(Protocol[V_contra]):
    """Trains a network on views of slides, and predicts with it.

    ``plan`` is there where memory is planned, so that less can be taken; ``waited_seconds`` tells how long the last step or
    prediction stood still for pixels.
    """

    waited_seconds: float

    @property
    def network(self) -> StagedNetwork: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def plan(self) -> Plan | None: ...

    def go_on_with(self, plan: Plan) -> None:
        """Take another plan from now on, of the same arithmetic."""

    def step(
        self,
        view: V_contra,
        label: int,
        draws: Draws,
        *,
        weight: float = 1.0,
        stages: Collection[int] | None = None,
    ) -> StepResult:
        """Forward and backward of one slide: adds ``weight`` times the gradient to the parameters' ``.grad``."""

    def predict(self, view: V_contra, *, classifiers: Collection[int] | None = None) -> np.ndarray:
        """Class probabilities of each part's classifier, (depth, classes) float64, NaN where one was not asked."""

    def explain(self, view: V_contra) -> Iterator[StageHeat] | Iterator[PatchHeat]:
        """What each part's classifier looked at, part after part, from 1; the view stays open meanwhile."""


class Source(Protocol[V_co]):
    """Opens slides as what a learner takes."""

    def open(self, entry: Entry, draws: Draws | None = None) -> V_co:
        """A view that the caller closes. ``draws`` decides the augmentation; without, a view is the slide as it is.

        Raises:
            SlideError: the file cannot be read or used.
        """
