"""The folder of one slide's explanation. It is either there and complete, or not there.

``explanation.json`` says what the slide was taken for and where each map lies; ``maps.npz`` has their numbers and where tissue
is, ``maps.ome.tif`` the same numbers over all of level 0, ``overlay.ome.tif`` the main map over the slide, ``regions.geojson``
what stands out, ``pictures/`` each map.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from wholeslide.explain.canvas import Canvas, on_tissue
from wholeslide.explain.colours import COLOUR_MAPS, Scale
from wholeslide.explain.maps import HeatMap
from wholeslide.explain.ome import write_maps, write_picture
from wholeslide.explain.regions import feature_collection
from wholeslide.geometry import Box
from wholeslide.slides.files import cannot_write, part_name
from wholeslide.slides.readers import Pixels
from wholeslide.slides.working import WorkingSlide
from wholeslide.streaming.heat import Map

FORMAT_VERSION = 2
DESCRIPTION = "explanation.json"
OVERLAY_SIDE_PX, MAPS_SIDE_PX, PICTURE_SIDE_PX = 4096, 2048, 1024


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a run says of a slide.

    Attributes:
        file: the slide's name.
        classes: their names, in order.
        probabilities_kc: of each stage's classifier, float64; the last is the final one's.
        maps: of all stages, in order.
        checkpoint: the hash of the weights that it was made with.
    """

    file: str
    classes: tuple[str, ...]
    probabilities_kc: npt.NDArray[np.float64]
    maps: tuple[HeatMap, ...]
    checkpoint: str

    @property
    def prediction(self) -> str:
        """The final classifier's."""
        return self.classes[int(np.argmax(self.probabilities_kc[-1]))]

    @property
    def evidence(self) -> HeatMap:
        """The last stage's, for what the slide is taken for."""
        wanted = (len(self.probabilities_kc), "evidence", self.prediction)
        return next(heat for heat in self.maps if (heat.stage, heat.kind, heat.label) == wanted)

    @property
    def main(self) -> HeatMap:
        """The last stage's attention, for what the slide is taken for where there is one a class; without any, its evidence."""
        wanted = {None, self.prediction}
        last = (heat for heat in self.maps if heat.stage == len(self.probabilities_kc) and heat.kind == "attention")
        return next((heat for heat in last if heat.label in wanted), self.evidence)


def write_explanation(explanation: Explanation, slide: WorkingSlide, folder: Path) -> None:
    """Write a slide's folder, in place of one that is there.

    Args:
        explanation: of the slide.
        slide: where its pixels come from, as it was scanned.
        folder: made here.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
        SlideError: the slide cannot be decoded.
    """
    beside = folder.with_name(part_name(folder.name))
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _fill(explanation, slide, beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_description(folder: Path) -> dict[str, Any] | None:
    """What ``explanation.json`` says, where it is there, whole and of this format."""
    try:
        found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        known = found["format_version"] == FORMAT_VERSION and {"file", "checkpoint", "prediction"} <= found.keys()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if known else None


def _fill(explanation: Explanation, slide: WorkingSlide, folder: Path) -> None:
    l0_size, l0_mpp = slide.reader.l0_size, slide.l0_mpp
    overlay = Canvas.covering(l0_size, OVERLAY_SIDE_PX)
    small = Canvas.covering(l0_size, PICTURE_SIDE_PX)
    pixels = small.pixels(slide)
    (folder / "pictures").mkdir()
    _save_picture(pixels, folder / "thumbnail.png")
    described = []
    for number, heat in enumerate(explanation.maps):
        scale = Scale.of(heat, on_tissue(heat, slide))
        picture = f"pictures/{number:02d}-{_file_name(heat.title)}.png"
        _save_picture(_blended(heat, scale, slide, small, pixels), folder / picture)
        described.append(_described(heat, f"map_{number}", scale, picture))
    arrays: dict[str, Any] = {
        entry["array"]: heat.values_hw for entry, heat in zip(described, explanation.maps, strict=True)
    }
    np.savez_compressed(folder / "maps.npz", tissue=slide.mask.cells, **arrays)
    write_maps(folder / "maps.ome.tif", Canvas.covering(l0_size, MAPS_SIDE_PX), explanation.maps, l0_mpp)
    _write_overlay(explanation, slide, overlay, folder / "overlay.ome.tif")
    regions = feature_collection(_standing_out(explanation, slide), explanation.file)
    _write_json(folder / "regions.geojson", regions)
    facts = {
        "format_version": FORMAT_VERSION,
        "file": explanation.file,
        "prediction": explanation.prediction,
        "classes": list(explanation.classes),
        "probabilities_by_stage": explanation.probabilities_kc.tolist(),
        "checkpoint": explanation.checkpoint,
        "l0_width": l0_size.width,
        "l0_height": l0_size.height,
        "l0_mpp": None if l0_mpp is None else [l0_mpp.x, l0_mpp.y],
        "overlay_l0_px": overlay.l0_px,
        "picture_l0_px": small.l0_px,
        "main": explanation.main.title,
        "tissue": _tissue(slide),
        "maps": described,
    }
    _write_json(folder / DESCRIPTION, facts)


def _save_picture(pixels: Pixels, path: Path) -> None:
    """Quickly: on the texture of a slide, the usual effort took twice as long and saved no bytes."""
    Image.fromarray(pixels).save(path, compress_level=1)


def _write_overlay(explanation: Explanation, slide: WorkingSlide, canvas: Canvas, path: Path) -> None:
    heat = explanation.main
    scale = Scale.of(heat, on_tissue(heat, slide))
    write_picture(path, canvas, _blended(heat, scale, slide, canvas, canvas.pixels(slide)), slide.l0_mpp)


def _standing_out(explanation: Explanation, slide: WorkingSlide) -> list[tuple[HeatMap, Map]]:
    wanted = [explanation.main]
    if explanation.evidence is not explanation.main:
        wanted.append(explanation.evidence)
    return [(heat, on_tissue(heat, slide)) for heat in wanted]


def _blended(heat: HeatMap, scale: Scale, slide: WorkingSlide, canvas: Canvas, pixels: Pixels) -> Pixels:
    """A map over the slide, in strips."""
    blended = np.empty_like(pixels)
    for box in _strips(canvas):
        values = heat.at(*canvas.centres(box))
        blended[box.rows_columns] = scale.blended(values, pixels[box.rows_columns], canvas.tissue(slide, box))
    return blended


def _strips(canvas: Canvas, rows: int = 256) -> Iterator[Box]:
    width, height = canvas.size.width, canvas.size.height
    for top in range(0, height, rows):
        yield Box(0, top, width, min(rows, height - top))


def _tissue(slide: WorkingSlide) -> dict[str, Any]:
    """Where the mask's cells lie."""
    side = slide.mask.px_per_cell
    return {
        "array": "tissue",
        "l0_origin": slide.l0_from_whole(np.zeros((1, 2)))[0].tolist(),
        "l0_cell": [side * slide.sampling.downsample_x, side * slide.sampling.downsample_y],
    }


def _described(heat: HeatMap, array: str, scale: Scale, picture: str) -> dict[str, Any]:
    return {
        "title": heat.title,
        "kind": heat.kind,
        "stage": heat.stage,
        "class": heat.label,
        "array": array,
        "l0_origin": list(heat.l0_origin),
        "l0_cell": list(heat.l0_cell),
        "picture": picture,
        "colours": COLOUR_MAPS[heat.kind],
        "low": scale.low,
        "high": scale.high,
    }


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "-", title).strip("-")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
