"""The regions that stand out on a map, as GeoJSON in level-0 pixels, which QuPath opens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage

from wholeslide.explain.colours import COLOUR_MAPS
from wholeslide.explain.maps import HeatMap
from wholeslide.streaming.heat import Map

TOP_SHARE = 0.05
"""Of the tissue's cells: the highest of them make regions."""

MOST_REGIONS = 10
"""Of a map: those with the highest sums."""

_NAMES = uuid.UUID("6a9a4dd2-52f6-4c0e-9a4f-0b6f7a0d6c5e")


def feature_collection(maps: Sequence[tuple[HeatMap, Map]], slide: str) -> dict[str, Any]:
    """The top regions of some maps, each given with its values on tissue, NaN elsewhere.

    Cells touch along their sides and corners. Evidence against a class makes no region. A map on which nothing stands out has none.
    """
    features = [feature for heat, shown in maps for feature in _features(heat, shown, slide)]
    return {"type": "FeatureCollection", "features": features}


def _features(heat: HeatMap, shown: Map, slide: str) -> Iterator[dict[str, Any]]:
    top = _top(shown)
    numbered, count = ndimage.label(top, structure=np.ones((3, 3)))
    sums = ndimage.sum_labels(np.where(top, shown, 0), numbered, np.arange(1, count + 1))
    for rank, index in enumerate(np.argsort(-np.atleast_1d(sums), kind="stable")[:MOST_REGIONS].tolist(), start=1):
        cells_n2 = np.argwhere(numbered == index + 1)
        values = shown[tuple(cells_n2.T)]
        name = f"{heat.title}, region {rank}"
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMES, f"{slide}\n{name}")),
            "geometry": json.loads(shapely.to_geojson(_outline(heat, cells_n2))),
            "properties": {
                "objectType": "annotation",
                "name": name,
                "classification": {"name": heat.label or heat.kind, "color": _colour(heat)},
                "measurements": {"mean": float(values.mean()), "largest": float(values.max()), "cells": len(cells_n2)},
            },
        }


def _top(shown: Map) -> npt.NDArray[np.bool_]:
    """The highest cells of the tissue, of those that are above zero and above the rest."""
    values = shown[np.isfinite(shown)]
    if not values.size or values.max() == values.min():
        return np.zeros(shown.shape, np.bool_)
    least = max(float(np.quantile(values, 1 - TOP_SHARE)), 0.0)
    with np.errstate(invalid="ignore"):
        top: npt.NDArray[np.bool_] = (shown >= least) & (shown > max(float(values.min()), 0.0))
    return top


def _outline(heat: HeatMap, cells_n2: npt.NDArray[np.int64]) -> shapely.Geometry:
    """The union of cells, given as rows and columns; several polygons where they touch at corners only.

    Their outer rings turn as RFC 7946 wants it, counterclockwise for who takes y to point upwards.
    """
    (x, y), (width, height) = heat.l0_origin, heat.l0_cell
    lefts, tops = x + cells_n2[:, 1] * width, y + cells_n2[:, 0] * height
    rights, bottoms = x + (cells_n2[:, 1] + 1) * width, y + (cells_n2[:, 0] + 1) * height
    return shapely.orient_polygons(shapely.union_all(shapely.box(lefts, tops, rights, bottoms)))


def _colour(heat: HeatMap) -> list[int]:
    """Near the upper end of the map's colours."""
    rgba = matplotlib.colormaps[COLOUR_MAPS[heat.kind]](0.85)
    return [round(255 * part) for part in rgba[:3]]
