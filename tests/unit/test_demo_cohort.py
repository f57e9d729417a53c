"""The demonstration's slides as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pandas as pd

from wholeslide.cohort.manifest import read_cohort
from wholeslide.demo.cohort import MPP, DemoCohortConfig, draw_pairs, write_cohort, write_pyramid
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.inspect import inspect_slide
from wholeslide.slides.working import open_working_slide


def test_the_manifest_is_a_cohort(tiny_cohort: Path) -> None:
    cohort = read_cohort(tiny_cohort / "manifest.csv", tiny_cohort / "slides")
    assert cohort.classes == ("disc", "ring")
    assert cohort.table["split"].value_counts().to_dict() == {"train": 6, "valid": 4, "test": 4}
    for _, pair in cohort.table.groupby("pair"):
        assert len(set(pair["split"])) == 1
        assert sorted(pair["label"]) == ["disc", "ring"]
    assert cohort.table["patient"].is_unique


def test_names_do_not_tell_the_class() -> None:
    letters = []
    for seed in range(12):
        slide = next(draw_pairs(1, seed=seed, tissue_px=(560, 570)))
        letters.append(np.random.default_rng(slide.texture_seed).random() < 0.5)
    assert 0 < sum(letters) < len(letters)


def test_openslide_reads_scale_and_levels(tiny_cohort: Path) -> None:
    path = tiny_cohort / "slides" / "slide-000a.tif"
    with openslide.OpenSlide(path) as slide:
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == MPP
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == MPP
        assert "tile-width" in " ".join(slide.properties)


def test_a_slide_of_the_default_size_has_over_a_thousand_working_pixels(tmp_path: Path) -> None:
    config = DemoCohortConfig()
    assert 2 * config.test_pairs >= 40
    for number, specimen in enumerate(draw_pairs(2, seed=0, tissue_px=config.tissue_px)):
        path = tmp_path / f"{number}.tif"
        write_pyramid(path, specimen.render()["ring"], mpp=MPP)
        found = inspect_slide(path, SlideConfig())
        assert found["working_mpp"] == MPP
        assert len(found["levels"]) > 1
        tissue = np.ptp(specimen.px_outline, axis=0)
        assert min(found["working_width"], found["working_height"]) >= 1000
        assert abs(found["working_width"] - tissue[0]) < 32
        assert abs(found["working_height"] - tissue[1]) < 32


def test_the_tissue_mask_keeps_the_objects(tiny_cohort: Path) -> None:
    slide = open_working_slide(tiny_cohort / "slides" / "slide-001a.tif", SlideConfig())
    try:
        assert slide.tissue_fraction > 0.5
        assert slide.size.width > 500
    finally:
        slide.close()


def test_the_same_seed_writes_the_same_pixels(tmp_path: Path) -> None:
    config = DemoCohortConfig(train_pairs=1, valid_pairs=0, test_pairs=1, tissue_px=(560, 570), seed=3)
    one, two = tmp_path / "one", tmp_path / "two"
    tables = [pd.read_csv(write_cohort(folder, config)) for folder in (one, two)]
    assert tables[0].equals(tables[1])
    for name in tables[0]["file"]:
        assert (one / "slides" / name).read_bytes() == (two / "slides" / name).read_bytes()
