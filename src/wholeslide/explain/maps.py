"""Maps of what was looked at, each with its place on level 0 of the slide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from wholeslide.baselines.heat import PatchHeat
from wholeslide.slides.view import SlideView
from wholeslide.streaming.heat import Map, StageHeat

Kind = Literal["attention", "evidence"]
Heat = StageHeat | PatchHeat
Pair = tuple[float, float]

_CELLS_OF_A_PATCH = 8
"""Along each side: so finely are patches placed that lie on no common grid, as at a slide's border."""


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One map, in cells of one size.

    Attributes:
        kind: ``attention``, as many times its mean over all cells of the map, or ``evidence``, in units of the logit.
        stage: of the classifier that it is of, from 1.
        label: the class that it speaks of; ``None`` where it is of all classes.
        values_hw: NaN where nothing was computed.
        l0_origin: the upper left corner of the first cell in level-0 pixels, x before y.
        l0_cell: width and height of a cell in level-0 pixels.
    """

    kind: Kind
    stage: int
    label: str | None
    values_hw: Map
    l0_origin: Pair
    l0_cell: Pair

    @property
    def title(self) -> str:
        """Such as ``evidence for tumour, stage 4``."""
        return f"{self.kind}{'' if self.label is None else f' for {self.label}'}, stage {self.stage}"

    def at(self, l0_x_w: npt.NDArray[np.float64], l0_y_h: npt.NDArray[np.float64]) -> Map:
        """The cells at the crossings of columns and rows of level-0 pixels, (h, w); NaN beside the map."""
        return cells_at(self.values_hw, self.l0_origin, self.l0_cell, l0_x_w, l0_y_h)


def cells_at(
    values_hw: Map,
    l0_origin: Pair,
    l0_cell: Pair,
    l0_x_w: npt.NDArray[np.float64],
    l0_y_h: npt.NDArray[np.float64],
) -> Map:
    """The values of a grid of cells at the crossings of columns and rows of level-0 pixels, (h, w); NaN beside the grid."""
    height, width = values_hw.shape
    columns = np.floor((l0_x_w - l0_origin[0]) / l0_cell[0]).astype(np.int64)
    rows = np.floor((l0_y_h - l0_origin[1]) / l0_cell[1]).astype(np.int64)
    found: Map = values_hw[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)]
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return np.where(inside, found, np.float32(np.nan))


class PatchPlaces(Protocol):
    """A view that is a slide's patches."""

    def l0_patches(self) -> tuple[npt.NDArray[np.float64], Pair]: ...


def maps_of(heat: Heat, view: SlideView | PatchPlaces, classes: Sequence[str]) -> Iterator[HeatMap]:
    """The maps of one stage: attention first, where there is any, then the evidence for each class.

    Args:
        heat: of the stage.
        view: what it was shown, not augmented.
        classes: their names, in order.

    Raises:
        FeatureError: features from a file that does not say where their patches lie.
    """
    if isinstance(heat, StageHeat):
        assert isinstance(view, SlideView)
        yield from _maps_of_stage(heat, view, classes)
    else:
        assert not isinstance(view, SlideView)
        yield from _maps_of_patches(heat, view, classes)


def _maps_of_stage(heat: StageHeat, view: SlideView, classes: Sequence[str]) -> Iterator[HeatMap]:
    slide = view.slide
    assert view.augmentation.crop_box.size == slide.size, "a view that is not augmented"
    corner = np.array([(slide.whole_box.left, slide.whole_box.top)], dtype=np.float64)
    x, y = slide.l0_from_whole(corner)[0].tolist()

    def placed(kind: Kind, label: str | None, values_hw: Map, cell_px: int) -> HeatMap:
        cell = (cell_px * slide.sampling.downsample_x, cell_px * slide.sampling.downsample_y)
        return HeatMap(kind, heat.number, label, values_hw, (x, y), cell)

    yield placed("attention", None, _relative(heat.attention_hw), heat.attention_px)
    for label, values_hw in zip(classes, heat.evidence_chw, strict=True):
        yield placed("evidence", label, values_hw, heat.evidence_px)


def _maps_of_patches(heat: PatchHeat, view: PatchPlaces, classes: Sequence[str]) -> Iterator[HeatMap]:
    corners_n2, side = view.l0_patches()
    origin = corners_n2.min(axis=0)
    cell = np.array(side) / _CELLS_OF_A_PATCH
    cells_n2 = np.rint((corners_n2 - origin) / cell).astype(np.int64)

    def placed(kind: Kind, label: str | None, values_n: Map) -> HeatMap:
        x, y = origin.tolist()
        return HeatMap(kind, heat.number, label, _painted(cells_n2, values_n), (x, y), (float(cell[0]), float(cell[1])))

    if heat.attention_bn is not None:
        branches = classes if len(heat.attention_bn) == len(classes) else [None] * len(heat.attention_bn)
        for label, values_n in zip(branches, heat.attention_bn, strict=True):
            yield placed("attention", label, _relative(values_n))
    for label, values_n in zip(classes, heat.evidence_cn, strict=True):
        yield placed("evidence", label, values_n)


def _painted(cells_n2: npt.NDArray[np.int64], values_n: Map) -> Map:
    """Patches on a grid of cells, the mean where they overlap, NaN where there are none."""
    width, height = (cells_n2.max(axis=0) + _CELLS_OF_A_PATCH).tolist()
    total, count = np.zeros((height, width)), np.zeros((height, width), np.int64)
    for (column, row), value in zip(cells_n2.tolist(), values_n.tolist(), strict=True):
        patch = (slice(row, row + _CELLS_OF_A_PATCH), slice(column, column + _CELLS_OF_A_PATCH))
        total[patch] += value
        count[patch] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _relative(attention: Map) -> Map:
    """As many times the mean."""
    found: Map = (attention * np.float32(attention.size)).astype(np.float32)
    return found
