"""Rows of a cohort, opened as the views that the engine eats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from wholeslide.draws import Draws
from wholeslide.geometry import Size
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.prepare import find_prepared
from wholeslide.slides.view import SlideView, make_view
from wholeslide.slides.working import WorkingSlide, open_working_slide


@dataclass(frozen=True)
class Entry:
    """One row of a cohort: one file. ``mpp`` is the manifest's own scale for it, in microns per stored pixel."""

    file: str
    path: Path
    slide: str
    patient: str
    label: str
    mpp: float | None

    @property
    def identity(self) -> dict[str, str]:
        """The columns that every table of predictions begins with."""
        return {"file": self.file, "slide": self.slide, "patient": self.patient, "label": self.label}


def entries(table: pd.DataFrame) -> list[Entry]:
    """The rows of a cohort's table, in order."""
    return [
        Entry(
            file=str(row["file"]),
            path=Path(str(row["path"])),
            slide=str(row["slide"]),
            patient=str(row["patient"]),
            label=str(row["label"]),
            mpp=_scale(row.get("mpp")),
        )
        for row in table.to_dict("records")
    ]


@dataclass(frozen=True)
class ViewSource:
    """Opens entries as views, always the same way.

    ``mean_grey`` is the training tissue's, in [0, 1]; ``padded_size`` is the network's. Without ``augmentation`` a
    view is the slide as it is.
    """

    slide_config: SlideConfig
    padded_size: Callable[[Size], Size]
    cache: Path | None = None
    augmentation: AugmentationConfig | None = None
    mean_grey: float = 0.5

    def open(self, entry: Entry, draws: Draws | None = None) -> SlideView:
        """A view that the caller closes. ``draws`` decides the augmentation.

        Raises:
            SlideError: the file cannot be read or used.
        """
        slide = open_slide_of(entry, self.slide_config, self.cache)
        if draws is None or self.augmentation is None:
            return make_view(slide, padded_size=self.padded_size)
        return make_view(
            slide,
            augmentation=self.augmentation,
            rng=draws.rng("augmentation"),
            mean_grey=self.mean_grey,
            padded_size=self.padded_size,
        )


def open_slide_of(entry: Entry, config: SlideConfig, cache: Path | None) -> WorkingSlide:
    """The slide at its working resolution, from the cache if it was prepared.

    Raises:
        SlideError: the file cannot be read or used.
    """
    prepared = find_prepared(cache, entry.path, config, mpp=entry.mpp) if cache is not None else None
    return open_working_slide(prepared or entry.path, config, mpp=entry.mpp)


def _scale(value: object) -> float | None:
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)
