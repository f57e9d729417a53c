"""Tissue annotations exported from QuPath as GeoJSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.draw import polygon

from wholeslide.geometry import Size
from wholeslide.slides.readers import slide_error

REMEDY = "export the tissue annotations from QuPath: File > Export objects as GeoJSON"
Ring = npt.NDArray[np.float64]


def read_polygons(path: Path) -> list[list[Ring]]:
    """The polygons of a FeatureCollection, a list of features, a feature or a geometry.

    Returns:
        A list of polygons, each a list of rings of shape (points, 2), x and y in level-0 pixels as QuPath shows them
        (from the upper left corner of the scanned bounds): the outer ring first, then its holes.

    Raises:
        SlideError: the file is no GeoJSON, or holds no polygon.
    """
    try:
        polygons = list(_polygons(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise slide_error(f"the mask cannot be read: {error}", path, REMEDY) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise slide_error(f"the mask is not GeoJSON: {error!r}", path, REMEDY) from error
    if not polygons:
        raise slide_error("the mask holds no polygon", path, REMEDY)
    return polygons


def rasterize(
    polygons: list[list[Ring]], l0_px_per_cell: tuple[float, float], cells_size: Size
) -> npt.NDArray[np.bool_]:
    """Cells whose centre lies inside a polygon and outside its holes: bool of shape (rows, columns).

    Args:
        polygons: see :func:`read_polygons`.
        l0_px_per_cell: level-0 pixels that a cell spans along x and y.
        cells_size: columns and rows.
    """
    shape = (cells_size.height, cells_size.width)
    mask = np.zeros(shape, np.bool_)
    for rings in polygons:
        inside = np.zeros(shape, np.bool_)
        for index, ring in enumerate(rings):
            cell_x = ring[:, 0] / l0_px_per_cell[0] - 0.5
            cell_y = ring[:, 1] / l0_px_per_cell[1] - 0.5
            inside[polygon(cell_y, cell_x, shape)] = index == 0  # type: ignore[no-untyped-call]
        mask |= inside
    return mask


def _polygons(node: Any) -> list[list[Ring]]:
    if isinstance(node, list):
        return [polygon for item in node for polygon in _polygons(item)]
    kind = node["type"]
    if kind == "FeatureCollection":
        return _polygons(node["features"])
    if kind == "Feature":
        return _polygons(node["geometry"]) if node["geometry"] is not None else []
    if kind == "GeometryCollection":
        return _polygons(node["geometries"])
    if kind == "Polygon":
        return [_rings(node["coordinates"])]
    if kind == "MultiPolygon":
        return [_rings(coordinates) for coordinates in node["coordinates"]]
    return []


def _rings(coordinates: Any) -> list[Ring]:
    rings = [np.asarray(ring, np.float64)[:, :2] for ring in coordinates]
    if any(len(ring) < 3 for ring in rings):
        raise ValueError("a polygon of fewer than three points")
    return rings
