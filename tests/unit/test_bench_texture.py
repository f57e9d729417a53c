"""The slides of the benchmarks: a disc of texture, exactly white beside it, and found again by the tissue mask."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from wholeslide.bench.memory_step import varying_of
from wholeslide.bench.texture import SQUARE_PX, Disc, write_texture
from wholeslide.geometry import Box, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.view import make_view
from wholeslide.slides.working import open_working_slide
from wholeslide.streaming.background import VaryingPixels

WHITE = 255


def test_a_disc_inside_the_slide_has_the_radius_of_its_area() -> None:
    disc = Disc.covering(Size(2000, 1500), 0.25)
    assert math.isclose(disc.radius_px, math.sqrt(0.25 * 2000 * 1500 / math.pi), rel_tol=1e-3)


@pytest.mark.parametrize(("size", "fraction"), [("3000x1000", 0.35), ("1000x3000", 0.9), ("1600x1600", 0.99)])
def test_a_disc_that_the_edges_cut_covers_as_much(size: str, fraction: float) -> None:
    parsed = Size.parse(size)
    disc = Disc.covering(parsed, fraction)
    assert 2 * disc.radius_px > min(parsed.width, parsed.height)
    assert disc.pixels(Box.covering(parsed)).mean() == pytest.approx(fraction, abs=0.005)


def test_all_of_a_slide_is_covered_exactly() -> None:
    size = Size(701, 603)
    assert Disc.covering(size, 1.0).pixels(Box.covering(size)).all()


@pytest.mark.parametrize(("size", "fraction"), [("1201x1007", 0.2), ("2101x901", 0.5)])
def test_white_decodes_to_exactly_white(size: str, fraction: float, tmp_path: Path) -> None:
    l0_size = Size.parse(size)
    write_texture(tmp_path / "slide.tif", l0_size, seed=3, tissue_fraction=fraction)
    reader = open_slide(tmp_path / "slide.tif")
    pixels = reader.read_level(0, Box.covering(l0_size))
    textured = Disc.covering(l0_size, fraction).pixels(Box.covering(l0_size))
    assert (pixels[~textured] == WHITE).all()
    squares = np.logical_or.reduceat((pixels != WHITE).any(axis=2), np.arange(0, l0_size.height, SQUARE_PX), axis=0)
    squares = np.logical_or.reduceat(squares, np.arange(0, l0_size.width, SQUARE_PX), axis=1)
    assert (squares == Disc.covering(l0_size, fraction).squares(Box.covering(l0_size))).all()
    assert [round(level.downsample) for level in reader.levels] == [1, 4, 16]
    reader.close()


@pytest.mark.parametrize("level", [1, 2])
def test_reduced_levels_show_the_same_slide(level: int, tmp_path: Path) -> None:
    l0_size = Size(2048, 1536)
    write_texture(tmp_path / "slide.tif", l0_size, seed=0, tissue_fraction=0.4)
    reader = open_slide(tmp_path / "slide.tif")
    side = round(reader.levels[level].downsample)
    whole = reader.read_level(0, Box.covering(l0_size)).astype(np.float32)
    means = whole.reshape(l0_size.height // side, side, l0_size.width // side, side, 3).mean(axis=(1, 3))
    reduced = reader.read_level(level, Box.covering(reader.levels[level].size)).astype(np.float32)
    reader.close()
    assert np.abs(reduced - means).mean() < 3


@pytest.mark.parametrize(("size", "fraction"), [("1200x1000", 0.2), ("3001x1203", 0.35), ("900x2000", 0.05)])
def test_the_mask_is_the_disc_and_a_small_margin(size: str, fraction: float, tmp_path: Path) -> None:
    write_texture(tmp_path / "slide.tif", Size.parse(size), seed=1, tissue_fraction=fraction)
    slide = open_working_slide(tmp_path / "slide.tif", SlideConfig(mpp="native", background="constant"))
    disc, side = Disc.covering(slide.whole_size, fraction), slide.mask.px_per_cell
    masked = slide.mask.pixels(Box.covering(slide.whole_size))
    assert not (disc.pixels(Box.covering(slide.whole_size)) & ~masked).any()
    wider = Disc(disc.size, disc.radius_px + SQUARE_PX + 6 * side)
    assert not (masked & ~wider.pixels(Box.covering(slide.whole_size))).any()
    slide.close()


@pytest.mark.parametrize("cropped", [True, False])
def test_what_varies_is_known_without_reading(cropped: bool, tmp_path: Path) -> None:
    """The disc, told from its formula, is where the view's pixels are not white, cropped to the tissue or not."""
    size = Size(1600, 1200)
    write_texture(tmp_path / "slide.tif", size, seed=0, tissue_fraction=0.1)
    slide = open_working_slide(tmp_path / "slide.tif", SlideConfig(mpp="native", background="constant"))
    if not cropped:
        slide.whole_box = Box.covering(slide.whole_size)
    view = make_view(slide)
    assert (view.size != size) == cropped
    found, expected = varying_of(view, 0.1), VaryingPixels(view.size)
    expected.note(Box.covering(view.size), view.read(Box.covering(view.size)), view.background)
    np.testing.assert_array_equal(found._blocks, expected._blocks)
    view.close()


def test_a_view_knows_its_background_without_reading(tmp_path: Path) -> None:
    write_texture(tmp_path / "slide.tif", Size(1600, 1200), seed=0, tissue_fraction=0.1)
    slide = open_working_slide(tmp_path / "slide.tif", SlideConfig(mpp="native", background="constant"))
    slide.whole_box = Box.covering(slide.whole_size)
    view = make_view(slide)
    assert view.size == Size(1600, 1200)
    assert view.is_background(Box(0, 0, 300, 300))
    assert not view.is_background(Box(700, 500, 100, 100))
    view.close()
