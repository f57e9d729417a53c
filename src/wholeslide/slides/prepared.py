"""What a prepared slide carries in its description: its parameters, its key, and its tissue mask."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wholeslide.geometry import Mpp
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.readers import Rgb, SlideReader, slide_error
from wholeslide.slides.tissue import TissueMask

if TYPE_CHECKING:
    from wholeslide.slides.working import WorkingSlide

MARK = "wholeslide_prepared"
FORMAT_VERSION = 1
REMEDY = "prepare the original again with the same options, or use the original"


@dataclass(frozen=True)
class PreparedDescription:
    """The description of a prepared slide, checked against the configuration that opens it."""

    key: str
    mask: TissueMask
    working_mpp: Mpp | None
    background: Literal["constant", "keep"]
    background_rgb: Rgb


def describe_prepared(slide: WorkingSlide, config: SlideConfig) -> str:
    """The text that :func:`read_prepared` reads back; ASCII."""
    cells = slide.mask.cells
    content = {
        MARK: FORMAT_VERSION,
        "key": slide.key,
        "parameters": _parameters(config),
        "working_mpp": [slide.working_mpp.x, slide.working_mpp.y] if slide.working_mpp else None,
        "background": slide.background,
        "background_rgb": list(slide.background_rgb),
        "mask_shape": list(cells.shape),
        "mask_px_per_cell": slide.mask.px_per_cell,
        "mask_cells": base64.b64encode(zlib.compress(np.packbits(cells).tobytes(), 9)).decode("ascii"),
    }
    return json.dumps(content)


def read_prepared(reader: SlideReader, config: SlideConfig) -> PreparedDescription | None:
    """The description of a prepared slide; ``None`` where the file is an original.

    Raises:
        SlideError: it was prepared by another version or for other parameters, or its description is damaged.
    """
    if MARK not in reader.description[:64]:
        return None
    try:
        content = json.loads(reader.description)
        version, parameters = content[MARK], content["parameters"]
    except (ValueError, KeyError, TypeError) as error:
        raise slide_error("the prepared slide's description is damaged", reader.path, REMEDY) from error
    if version != FORMAT_VERSION:
        raise slide_error(f"prepared in format {version}, not {FORMAT_VERSION}", reader.path, REMEDY)
    if parameters != _parameters(config):
        raise slide_error("the slide was prepared with other options", reader.path, REMEDY)
    return _parse(content, reader)


def _parse(content: dict[str, Any], reader: SlideReader) -> PreparedDescription:
    try:
        rows, columns = content["mask_shape"]
        packed = np.frombuffer(zlib.decompress(base64.b64decode(content["mask_cells"])), np.uint8)
        cells = np.unpackbits(packed, count=rows * columns).reshape(rows, columns).astype(np.bool_)
        red, green, blue = content["background_rgb"]
        return PreparedDescription(
            key=content["key"],
            mask=TissueMask(cells, content["mask_px_per_cell"], reader.l0_size),
            working_mpp=Mpp(*content["working_mpp"]) if content["working_mpp"] else None,
            background=content["background"],
            background_rgb=(red, green, blue),
        )
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise slide_error("the prepared slide's description is damaged", reader.path, REMEDY) from error


def _parameters(config: SlideConfig) -> dict[str, Any]:
    """What must agree for a prepared slide to stand for the original."""
    return {
        "target_mpp": config.target_mpp,
        "target_downsample": config.target_downsample,
        "background": config.background,
        "mpp_override": config.mpp_override,
    }
