"""What every network has that is trained in parts, one after another or side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn


class StagedNetwork(nn.Module, ABC):
    """A network of parts, numbered from 1, that are trained by losses of their own; each has a classifier."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of parts."""

    @abstractmethod
    def backbone_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        """What the loss of part ``stage``, or of any, trains in layers that may have been trained before."""

    @abstractmethod
    def head_parameters(self, stage: int | None = None) -> list[nn.Parameter]:
        """Likewise in layers that start at random."""

    def normalise_by(self, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        """Take the mean and the deviation of the training tissue's pixels, in [0, 1], three numbers each."""

    def reconstructs(self, stage: int) -> bool:
        """Whether a part has a second loss, that of a reconstruction."""
        return False
