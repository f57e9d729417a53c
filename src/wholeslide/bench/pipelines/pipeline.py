"""What the pipelines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wholeslide.bench.pipelines.case import SpeedCase
from wholeslide.bench.pyramid import WORKING_MPP
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.working import WorkingSlide, open_working_slide

Probabilities = npt.NDArray[np.float64]

CLASSES = 2
#: Of an H&E slide's tissue, in [0, 1]; normalisation takes the same time whatever they are.
PIXEL_MEAN, PIXEL_STD = (0.6, 0.5, 0.6), (0.2, 0.2, 0.2)
CPU = torch.device("cpu")


class Pipeline(ABC):
    """A network, ready to predict. What it predicts is of no use, as its weights are random; what it computes is the same."""

    @abstractmethod
    def warm_up(self) -> None:
        """Compute one batch, or one tile of each stage, of as many pixels as :meth:`predict` takes at once."""

    @abstractmethod
    def predict(self) -> Probabilities:
        """From opening the file to class probabilities, (classes,); reads while it computes, if it ever does."""

    @abstractmethod
    def read(self) -> None:
        """The reading of :meth:`predict` alone, from opening the file on, by as many threads or processes."""

    @abstractmethod
    def load(self) -> None:
        """Bring all pixels that :meth:`predict` reads into memory, 3 bytes each."""

    @abstractmethod
    def compute(self) -> Probabilities:
        """What :meth:`predict` gives, from the pixels in memory."""

    @abstractmethod
    def flops(self) -> int:
        """Of the network, undivided, on all that was loaded."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the pipeline chose for itself."""

    @abstractmethod
    def close(self) -> None:
        """Release what was loaded."""


def open_tissue(case: SpeedCase, *, fast: bool = True) -> WorkingSlide:
    """The slide at 5x, cropped to the tissue that is found in it; all of it where all of it is tissue."""
    return open_working_slide(
        Path(case.path),
        SlideConfig(mpp=WORKING_MPP, background="keep" if case.tissue_fraction == 1 else "constant"),
        fast=fast,
    )
