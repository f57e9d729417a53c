"""The tissue mask: pens, glass, fluorescence, and images full of tissue."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from slides_cases import GLASS, real_file, tissue_image

from wholeslide.geometry import Box, Size
from wholeslide.slides.opening import open_slide
from wholeslide.slides.tissue import TissueMask, find_tissue, is_dark

CELL_PX = 16
INKS = {
    "blue": (30, 60, 160),
    "light-blue": (70, 110, 200),
    "pure-blue": (0, 0, 255),
    "navy": (20, 30, 110),
    "green": (20, 130, 60),
    "pure-green": (0, 200, 0),
    "black": (25, 25, 28),
    "red": (200, 30, 40),
    "dark-red": (180, 20, 30),
}
STROKES = {
    "on glass": (150, [(100, 200), (700, 300), (150, 900), (100, 1500)]),
    "across tissue": (60, [(200, 1300), (1000, 1500), (1500, 1200), (2100, 1700), (1900, 2500)]),
}


def thumbnail(image: np.ndarray) -> np.ndarray:
    rows, columns = image.shape[0] // CELL_PX, image.shape[1] // CELL_PX
    cut = image[: rows * CELL_PX, : columns * CELL_PX].reshape(rows, CELL_PX, columns, CELL_PX, 3)
    return cut.mean(axis=(1, 3)).round().astype(np.uint8)


def enlarged_mask(image: np.ndarray) -> np.ndarray:
    small = thumbnail(image)
    return np.kron(find_tissue(small, np.ones(small.shape[:2], np.bool_)), np.ones((CELL_PX, CELL_PX), np.bool_))


@pytest.fixture(scope="module")
def real_slide() -> np.ndarray:
    reader = open_slide(real_file("slides/cmu_small_region.svs"))
    pixels = reader.read_level(0, Box.covering(reader.l0_size))
    reader.close()
    return pixels


@pytest.fixture(scope="module")
def stained(real_slide: np.ndarray) -> np.ndarray:
    """Pixels that are tissue by an independent, plain rule: saturation over 0.1 after a blur of 5 pixels."""
    blurred = np.asarray(Image.fromarray(real_slide).filter(ImageFilter.BoxBlur(2)), np.float32)
    return (blurred.max(axis=2) - blurred.min(axis=2)) > 0.1 * blurred.max(axis=2)


def test_the_real_slide_keeps_its_tissue_and_loses_its_glass(real_slide: np.ndarray, stained: np.ndarray) -> None:
    mask = enlarged_mask(real_slide)
    tissue = stained[: mask.shape[0], : mask.shape[1]]
    assert mask[tissue].mean() >= 0.99
    assert mask.mean() < 1.35 * tissue.mean()


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("place", STROKES)
def test_pen_is_left_out_and_tissue_kept(real_slide: np.ndarray, stained: np.ndarray, ink: str, place: str) -> None:
    stroke = Image.new("L", real_slide.shape[1::-1])
    width_px, points = STROKES[place]
    ImageDraw.Draw(stroke).line(points, fill=255, width=width_px, joint="curve")
    cover = np.asarray(stroke.filter(ImageFilter.GaussianBlur(1.5)), np.float32)[..., None] / 255
    noise = np.random.default_rng(0).standard_normal((*real_slide.shape[:2], 1), np.float32) * 5
    painted = (real_slide * (1 - cover) + (np.float32(INKS[ink]) + noise) * cover).clip(0, 255).astype(np.uint8)
    mask = enlarged_mask(painted)
    cover = cover[: mask.shape[0], : mask.shape[1], 0]
    tissue = stained[: mask.shape[0], : mask.shape[1]] & (cover < 0.02)
    assert mask[tissue].mean() >= 0.98
    assert mask[cover > 0.5].mean() <= 0.05


@pytest.mark.parametrize(("folder", "suffix"), [("lymphoma/images", "jpg"), ("glas/images", "jpg")])
def test_images_full_of_tissue_are_not_split(folder: str, suffix: str) -> None:
    files = sorted(real_file(folder).glob(f"*.{suffix}"))[::40]
    fractions = []
    for file in files:
        small = np.asarray(Image.open(file).convert("RGB").reduce(8))
        fractions.append(find_tissue(small, np.ones(small.shape[:2], np.bool_)).mean())
    assert np.mean(fractions) > 0.85
    assert np.median(fractions) > 0.97


def test_synthetic_tissue_is_found() -> None:
    small = tissue_image(160, 128)
    mask = find_tissue(small, np.ones(small.shape[:2], np.bool_))
    ellipse = np.pi / 16
    assert ellipse < mask.mean() < 1.6 * ellipse


def test_glass_edges_dust_and_shadows_are_not_tissue() -> None:
    small = tissue_image(160, 128)
    small[:, 4:7] = (150, 152, 151)
    small[3:5] = (60, 60, 61)
    small[110:118, 120:128] = (190, 190, 191)
    mask = find_tissue(small, np.ones(small.shape[:2], np.bool_))
    assert not mask[:, :12].any()
    assert not mask[:10].any()
    assert not mask[105:122, 115:133].any()
    assert mask[64, 80]


def test_glass_alone_has_no_tissue() -> None:
    rng = np.random.default_rng(0)
    small = (np.array(GLASS) + rng.integers(-4, 5, (100, 100, 3))).clip(0, 255).astype(np.uint8)
    assert not find_tissue(small, np.ones(small.shape[:2], np.bool_)).any()


def test_dark_slides() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 4, (120, 160, 3), dtype=np.uint8)
    small[40:80, 50:110, 2] += rng.integers(0, 120, (40, 60), dtype=np.uint8)
    everywhere = np.ones(small.shape[:2], np.bool_)
    assert is_dark(small, everywhere)
    mask = find_tissue(small, everywhere)
    assert mask[42:78, 52:108].mean() > 0.98
    assert not mask[:25].any()
    bright = tissue_image(160, 128)
    bright[:60] = 0
    assert not is_dark(bright, np.ones(bright.shape[:2], np.bool_))


def test_what_was_not_scanned_is_not_tissue() -> None:
    small = tissue_image(160, 128)
    scanned = np.ones(small.shape[:2], np.bool_)
    scanned[:, 80:] = False
    small[:, 80:] = 0
    mask = find_tissue(small, scanned)
    assert mask[:, :80].any()
    assert not mask[:, 80:].any()


def test_mask_fraction_counts_the_last_cells_by_what_lies_in_the_slide() -> None:
    mask = TissueMask(np.array([[True, False], [False, True]]), 10, Size(15, 12))
    assert mask.fraction == pytest.approx((100 + 5 * 2) / 180)
    assert mask.px_bounds == Box(0, 0, 15, 12)
    assert mask.pixels(Box(8, 8, 4, 4)).tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert not mask.touches(Box(10, 0, 5, 10))
    assert mask.covers(Box(0, 0, 10, 10))
