"""A planted lesion lies in every output where OpenSlide finds it at level 0; nothing of the package's geometry decides that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import geojson_validator
import numpy as np
import openslide
import pytest
import shapely
import tifffile
from slides_cases import GLASS, STROMA, write_pyramid
from torch import nn

from wholeslide.baselines.bag_cache import BagCache
from wholeslide.baselines.heat import PatchHeat
from wholeslide.baselines.patch_view import PatchView
from wholeslide.explain.maps import HeatMap, maps_of
from wholeslide.explain.output import Explanation, write_explanation
from wholeslide.explain.stored import StoredExplanation
from wholeslide.geometry import Box, Size
from wholeslide.slides import openslide_reader
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.view import SlideView, make_view
from wholeslide.slides.working import WorkingSlide, open_working_slide
from wholeslide.streaming.heat import StageHeat

LESION = (120, 60, 140)
CLASSES = ("benign", "tumour")


@dataclass(frozen=True)
class Planted:
    """Boxes in level-0 pixels; ``cell_px`` is the side of a feature's cell in working pixels."""

    l0_size: Size
    tissue: Box
    lesion: Box
    bounds: Box | None = None
    mpp: float = 0.5
    target_mpp: float = 2.0
    cell_px: int = 4


CASES = {
    "in the middle": Planted(Size(2400, 2000), Box(300, 400, 1500, 1200), Box(900, 800, 240, 200)),
    "odd sizes": Planted(Size(2413, 1999), Box(317, 411, 1511, 1203), Box(1451, 999, 233, 311)),
    "at the lower right border": Planted(Size(2405, 2003), Box(1200, 1000, 1205, 1003), Box(2165, 1803, 240, 200)),
    "at the upper left border": Planted(Size(2405, 2003), Box(0, 0, 1205, 1003), Box(0, 0, 240, 200)),
    "a scale that divides nothing": Planted(
        Size(2413, 1999), Box(317, 411, 1511, 1203), Box(1451, 999, 233, 311), mpp=0.4661
    ),
    "pixels as they are stored": Planted(
        Size(811, 701), Box(100, 90, 500, 480), Box(333, 271, 90, 110), mpp=2.0, cell_px=6
    ),
    "scanned in part": Planted(
        Size(2400, 2000), Box(900, 700, 900, 900), Box(1403, 1205, 240, 200), bounds=Box(803, 611, 1203, 1207)
    ),
}


@pytest.fixture(params=CASES, ids=str)
def planted(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Planted, Path]:
    case = CASES[request.param]
    pixels = np.empty((case.l0_size.height, case.l0_size.width, 3), np.uint8)
    pixels[:] = GLASS
    pixels[case.tissue.rows_columns] = STROMA
    pixels[case.lesion.rows_columns] = LESION
    if case.bounds is not None:
        monkeypatch.setattr(openslide_reader, "_read_bounds", lambda *_: case.bounds)
    return case, write_pyramid(tmp_path / "slide.tif", pixels, case.mpp)


def opened(case: Planted, path: Path) -> WorkingSlide:
    return open_working_slide(path, SlideConfig(mpp=case.target_mpp, background="constant"))


def is_lesion(pixels: np.ndarray) -> np.ndarray:
    """Halfway from stroma to the lesion, and beyond."""
    return np.abs(pixels.astype(int) - LESION).sum(axis=-1) < np.abs(pixels.astype(int) - STROMA).sum(axis=-1)


def seen_in_cells(view: SlideView, cell_px: int) -> np.ndarray:
    """What a perfect network says of its cells, from the pixels that it is given: 1 for the lesion, 0 for the rest."""
    pixels = view.read(Box.covering(view.size))
    rows, columns = view.size.height // cell_px, view.size.width // cell_px
    cells = pixels[: rows * cell_px, : columns * cell_px].reshape(rows, cell_px, columns, cell_px, 3)
    return is_lesion(cells.mean(axis=(1, 3))).astype(np.float32)


def stage_maps(case: Planted, slide: WorkingSlide) -> tuple[HeatMap, ...]:
    side = case.cell_px * 5
    view = make_view(slide, padded_size=lambda s: Size(*(-(-length // side) * side for length in (s.width, s.height))))
    evidence = seen_in_cells(view, case.cell_px)
    attention = evidence.reshape(evidence.shape[0] // 5, 5, -1, 5).mean(axis=(1, 3))
    heat = StageHeat(
        1, np.array([0.2, 0.8]), attention / attention.sum(), side, np.stack([-evidence, evidence]), case.cell_px
    )
    return tuple(maps_of(heat, view, CLASSES))


def patch_maps(case: Planted, slide: WorkingSlide) -> tuple[HeatMap, ...]:
    bags = BagCache(nn.Identity(), least_tissue=0.3, folder=None)  # type: ignore[arg-type]  # nothing is encoded
    view = PatchView(slide.path, lambda: opened(case, slide.path), bags, patch_px=16, least_tissue=0.3)
    values = np.array([is_lesion(slide.read_whole(box)).mean() for box in view.boxes], np.float32)
    heat = PatchHeat(1, np.array([0.2, 0.8]), (values / values.sum())[None], np.stack([-values, values]))
    try:
        return tuple(maps_of(heat, view, CLASSES))
    finally:
        view.close()


def written(case: Planted, path: Path, maps: str) -> Path:
    slide = opened(case, path)
    made = (stage_maps if maps == "stages" else patch_maps)(case, slide)
    folder = path.parent / "explained"
    write_explanation(Explanation("slide.tif", CLASSES, np.array([[0.2, 0.8]]), made, "hash"), slide, folder)
    slide.close()
    return folder


def overlap(found: np.ndarray, l0_px: float, path: Path) -> float:
    """Intersection over union of some pixels of level 0 and the lesion, as OpenSlide reads it."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
        truth = is_lesion(np.asarray(slide.read_region((0, 0), 0, (width, height)).convert("RGB")))
    rows = np.minimum(np.arange(height) / l0_px, found.shape[0] - 1).astype(int)
    columns = np.minimum(np.arange(width) / l0_px, found.shape[1] - 1).astype(int)
    wide = found[rows][:, columns]
    return float((wide & truth).sum() / (wide | truth).sum())


def channel(folder: Path, title: str) -> tuple[np.ndarray, float]:
    """A map as any reader of OME-TIFF has it: its values, and level-0 pixels for each of its own."""
    with tifffile.TiffFile(folder / "maps.ome.tif") as tiff:
        names = [c["Name"] for c in tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]["Channel"]]
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        return tiff.series[0].asarray()[names.index(title)], pixels["PhysicalSizeX"]


def test_stages(planted: tuple[Planted, Path]) -> None:
    case, path = planted
    folder = written(case, path, "stages")
    values, mpp = channel(folder, "evidence for tumour, stage 1")
    right = overlap(values > 0.5, mpp / case.mpp, path)
    assert right > 0.85
    shift = round(case.cell_px * case.target_mpp / mpp)
    for step, axis in ((shift, 0), (-shift, 0), (shift, 1), (-shift, 1)):  # one cell beside would be seen
        assert overlap(np.roll(values, step, axis) > 0.5, mpp / case.mpp, path) < right


def test_patches(planted: tuple[Planted, Path]) -> None:
    case, path = planted
    folder = written(case, path, "patches")
    values, mpp = channel(folder, "evidence for tumour, stage 1")
    assert overlap(values > 0.5, mpp / case.mpp, path) > 0.4
    weights = np.nan_to_num(values)
    rows, columns = np.indices(values.shape)
    centre = np.array([(weights * (at + 0.5)).sum() / weights.sum() * mpp / case.mpp for at in (columns, rows)])
    middle = np.array([case.lesion.left + case.lesion.width / 2, case.lesion.top + case.lesion.height / 2])
    l0_patch_px = 16 * case.target_mpp / case.mpp
    assert np.abs(centre - middle).max() < l0_patch_px / 2


def test_regions_overlay_and_pictures(planted: tuple[Planted, Path]) -> None:
    case, path = planted
    folder = written(case, path, "stages")
    lesion = shapely.box(case.lesion.left, case.lesion.top, case.lesion.right, case.lesion.bottom)
    collection = json.loads((folder / "regions.geojson").read_text())
    assert geojson_validator.validate_structure(collection) == {}
    assert geojson_validator.validate_geometries(collection)["invalid"] == {}
    region = next(f for f in collection["features"] if f["properties"]["name"].startswith("evidence"))
    outline = shapely.from_geojson(json.dumps(region["geometry"]))
    assert outline.is_valid
    assert outline.intersection(lesion).area / outline.union(lesion).area > 0.8
    facts = json.loads((folder / "explanation.json").read_text())
    with openslide.OpenSlide(folder / "overlay.ome.tif") as overlay, openslide.OpenSlide(path) as slide:
        assert abs(overlay.dimensions[0] * facts["overlay_l0_px"] - slide.dimensions[0]) < facts["overlay_l0_px"]
        assert abs(float(overlay.properties["openslide.mpp-x"]) / facts["overlay_l0_px"] - case.mpp) < 0.01 * case.mpp
        below = np.asarray(overlay.read_region((0, 0), 0, overlay.dimensions).convert("RGB"))
    changed = np.abs(below.astype(int) - STROMA).sum(axis=-1) > 60
    inside = np.zeros(changed.shape, bool)
    box, step = case.tissue if case.bounds is None else case.tissue.intersection(case.bounds), facts["overlay_l0_px"]
    inside[box.top // step + 3 : box.bottom // step - 3, box.left // step + 3 : box.right // step - 3] = True
    # attention's cells are large, and reach over the lesion on every side
    attention, _ = channel(folder, "attention, stage 1")
    assert (changed & inside).sum() > 0.3 * (case.lesion.size.area / step**2)
    assert (facts["prediction"], facts["main"]) == ("tumour", "attention, stage 1")
    assert np.nanmax(attention) > 5


def test_what_a_viewer_lays_over_the_slide(planted: tuple[Planted, Path]) -> None:
    case, path = planted
    stored = StoredExplanation.read(written(case, path, "stages"))
    titles = [shown.heat.title for shown in stored.maps]
    assert titles[stored.main] == "attention, stage 1"
    assert stored.probabilities == {"benign": 0.2, "tumour": 0.8}
    columns, rows = np.arange(0.5, case.l0_size.width), np.arange(0.5, case.l0_size.height)
    seen = stored.colours(titles.index("evidence for tumour, stage 1"), columns, rows)
    assert seen.shape == (case.l0_size.height, case.l0_size.width, 4)
    assert overlap(seen[..., 3] > 90, 1, path) > 0.85  # of level 0, pixel by pixel
    assert (seen[seen[..., 3] > 90][:, 0] > seen[seen[..., 3] > 90][:, 2]).all()  # for the class: red


def test_a_map_has_the_mean_one_where_it_is_attention() -> None:
    heat = PatchHeat(1, np.array([0.5, 0.5]), np.array([[0.75, 0.25]], np.float32), np.zeros((2, 2), np.float32))

    class View:
        def l0_patches(self) -> tuple[np.ndarray, tuple[float, float]]:
            return np.array([[0.0, 0.0], [64.0, 0.0]]), (64.0, 64.0)

    attention = next(iter(maps_of(heat, View(), CLASSES)))
    assert attention.at(np.array([1.0, 63.0, 65.0, 127.0]), np.array([5.0])).tolist() == [[1.5, 1.5, 0.5, 0.5]]
    assert np.isnan(attention.at(np.array([-1.0, 128.5]), np.array([5.0]))).all()
