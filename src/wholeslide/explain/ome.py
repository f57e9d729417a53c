"""Pyramidal OME-TIFF that lies on level 0 of a slide: the overlay as a picture, and all maps as channels of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from wholeslide.explain.canvas import Canvas
from wholeslide.explain.maps import HeatMap
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.readers import Pixels
from wholeslide.streaming.heat import Map

TILE_PX = 256

_JPEG_QUALITY = 90


def write_picture(path: Path, canvas: Canvas, picture_hwc: Pixels, l0_mpp: Mpp | None) -> None:
    """A picture of the canvas, uint8 of shape (h, w, 3), with levels of half the size each.

    Raises:
        OSError: the file cannot be written.
    """
    levels = [picture_hwc]
    while max(levels[-1].shape) > TILE_PX:
        levels.append(halved(levels[-1]))

    def write(level: int, options: dict[str, Any]) -> Any:
        jpeg = {"compression": "jpeg", "compressionargs": {"level": _JPEG_QUALITY}}
        return levels[level], {**options, **jpeg, "photometric": "rgb"}

    _write(path, canvas, l0_mpp, len(levels), write, {"axes": "YXS"})


def write_maps(path: Path, canvas: Canvas, maps: Sequence[HeatMap], l0_mpp: Mpp | None) -> None:
    """Maps as float32 channels with their titles, NaN where nothing was computed, with levels of half the size each.

    A pixel has the value of the map's cell at its centre.

    Raises:
        OSError: the file cannot be written.
    """

    def write(level: int, options: dict[str, Any]) -> Any:
        coarse = _coarser(canvas, level)
        shape = (len(maps), coarse.size.height, coarse.size.width)
        tiles = (tile for heat in maps for tile in _tiles(heat, coarse))
        lossless = {"compression": "adobe_deflate", "photometric": "minisblack", "planarconfig": None}
        return tiles, {**options, **lossless, "shape": shape, "dtype": np.float32}

    count = 1
    while max(_coarser(canvas, count - 1).size.width, _coarser(canvas, count - 1).size.height) > TILE_PX:
        count += 1
    _write(path, canvas, l0_mpp, count, write, {"axes": "CYX", "Channel": {"Name": [heat.title for heat in maps]}})


def _write(
    path: Path,
    canvas: Canvas,
    l0_mpp: Mpp | None,
    levels: int,
    content: Callable[[int, dict[str, Any]], Any],
    metadata: dict[str, Any],
) -> None:
    """``content`` gives the data of each level, and the options that it is written with, from those that all have."""
    if l0_mpp is not None:
        for axis, mpp in (("X", l0_mpp.x), ("Y", l0_mpp.y)):
            metadata |= {f"PhysicalSize{axis}": mpp * canvas.l0_px, f"PhysicalSize{axis}Unit": "µm"}
    with tifffile.TiffWriter(path, ome=True, bigtiff=True) as tiff:
        for level in range(levels):
            options: dict[str, Any] = {"tile": (TILE_PX, TILE_PX)}
            if level == 0:
                options |= {"subifds": levels - 1, "metadata": metadata}
            else:
                options |= {"subfiletype": 1}
            if l0_mpp is not None:
                per_cm = tuple(1e4 / (mpp * canvas.l0_px * 2**level) for mpp in (l0_mpp.x, l0_mpp.y))
                options |= {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
            data, options = content(level, options)
            tiff.write(data, **options)


def _coarser(canvas: Canvas, level: int) -> Canvas:
    factor = 2**level
    return Canvas(Size(-(-canvas.size.width // factor), -(-canvas.size.height // factor)), canvas.l0_px * factor)


def _tiles(heat: HeatMap, canvas: Canvas) -> Iterator[Map]:
    """Of one channel, row by row; the last ones are filled up."""
    for top in range(0, canvas.size.height, TILE_PX):
        for left in range(0, canvas.size.width, TILE_PX):
            yield heat.at(*canvas.centres(Box(left, top, TILE_PX, TILE_PX)))


def halved(pixels: Pixels) -> Pixels:
    """The mean of 2 x 2 pixels; those of an odd border count twice."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(np.uint16)
    summed: npt.NDArray[np.uint16] = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    return ((summed + 2) // 4).astype(np.uint8)
