"""Tissue that is found strip by strip is that of whole planes, bit for bit, in a third of the memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.filters import threshold_otsu
from slides_cases import GLASS, tissue_image

from wholeslide.geometry import Box, Size
from wholeslide.slides import planes
from wholeslide.slides.density import OpticalDensity, glass_level
from wholeslide.slides.pen import pen_mask
from wholeslide.slides.planes import large_components, strips
from wholeslide.slides.tissue import TissueMask, find_tissue, is_dark

CROSS, SQUARE = (ndimage.generate_binary_structure(2, connectivity) for connectivity in (1, 2))
KINDS = ["stained", "faint", "glass", "full", "pens", "dark"]
INKS_RGB = [(30, 60, 160), (20, 130, 60), (25, 25, 28), (200, 30, 40)]


def reference(thumbnail: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    """The same with whole planes of everything, as the method is told."""
    if reference_is_dark(thumbnail, scanned):
        return reference_tidy(reference_fluorescence(thumbnail, scanned)) & scanned
    density = reference_density(thumbnail, scanned)
    drawn = reference_pen(density)
    return reference_tidy(reference_stain(density, scanned & ~drawn)) & scanned & ~drawn


def reference_is_dark(thumbnail: np.ndarray, scanned: np.ndarray) -> bool:
    levels = thumbnail[scanned]
    return bool((levels.max(axis=1) < 50).mean() > 0.3 and (levels.min(axis=1) > 180).mean() < 0.02)


def reference_glass(thumbnail: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    smallest, largest = thumbnail.min(axis=2), thumbnail.max(axis=2)
    bright = scanned & (smallest >= 200) & (largest - smallest <= 24)
    if bright.sum() < 0.01 * scanned.sum():
        return np.full(3, 245, np.float32)
    light = thumbnail.sum(axis=2, dtype=np.int32)
    return np.median(thumbnail[bright & (light >= np.median(light[bright]))], axis=0).astype(np.float32)


def reference_density(thumbnail: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    return np.maximum(-np.log10((thumbnail.astype(np.float32) + 1) / (reference_glass(thumbnail, scanned) + 1)), 0)


def reference_pen(density: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(density, 2, 0)
    strongest = density.max(axis=2)
    grey = 1 - (strongest - density.min(axis=2)) / np.maximum(strongest, 0.03)
    inks = [
        (
            (red > 0.15) & (blue < 0.55 * red) & (red > 0.8 * green),
            (red > 0.03) & (blue < 0.65 * red) & (red > 0.7 * green),
        ),
        (
            (red > 0.15) & (green < 0.8 * red) & (green < 1.1 * blue),
            (red > 0.03) & (green < 0.95 * red) & (green < 1.2 * blue),
        ),
        (
            ((grey > 0.95) & (strongest > 0.3))
            | ((grey > 0.92) & (strongest > 0.5))
            | ((grey > 0.86) & (strongest > 0.8)),
            (grey > 0.7) & (strongest > 0.06),
        ),
        (
            ((green > 0.3) & (blue > 0.77 * green) & (red < 0.22 * green))
            | ((green > 0.25) & (blue > 0.92 * green) & (red < 0.32 * green)),
            (green > 0.03) & (blue > 0.7 * green) & (red < 0.35 * green),
        ),
    ]
    drawn = np.zeros(density.shape[:2], np.bool_)
    for core, edge in inks:
        strokes = reference_large(core, 8, SQUARE)
        if strokes.any():
            drawn |= ndimage.binary_dilation(strokes, SQUARE, iterations=3, mask=edge | strokes)
    return drawn


def reference_stain(density: np.ndarray, usable: np.ndarray) -> np.ndarray:
    if not usable.any():
        return usable
    smoothed = ndimage.gaussian_filter(density, (0.7, 0.7, 0))
    strongest = smoothed.max(axis=2)
    chroma = strongest - smoothed.min(axis=2)
    glass = chroma[usable & (smoothed.mean(axis=2) < 0.03)]
    low = np.clip(2.5 * float(np.percentile(glass, 90)) if glass.size else 0.0, 0.02, 0.06)
    values = chroma[usable]
    high = np.clip(float(threshold_otsu(values)) if values.min() < values.max() else 0.0, 0.02, 0.06)
    weak = usable & ((chroma > low) | ((strongest > 0.25) & (chroma > 0.08 * strongest)))
    return ndimage.binary_propagation(usable & (chroma > max(low, high)), mask=weak)


def reference_fluorescence(thumbnail: np.ndarray, scanned: np.ndarray) -> np.ndarray:
    light = ndimage.gaussian_filter(thumbnail.max(axis=2).astype(np.float32), 4.0)
    lower = light[scanned & (light <= np.percentile(light[scanned], 20))]
    noise = 1.4826 * float(np.median(np.abs(lower - np.median(lower))))
    return light > float(np.percentile(light[scanned], 2)) + max(3.0, 5 * noise)


def reference_tidy(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        return mask
    closed = ndimage.binary_closing(np.pad(mask, 4, mode="edge"), ndimage.iterate_structure(CROSS, 2))[4:-4, 4:-4]
    kept = reference_large(closed, 16, SQUARE)
    holes = ~kept & ~reference_large(~kept, 257, CROSS)
    return ndimage.binary_dilation(kept | holes, CROSS)


def reference_large(mask: np.ndarray, least_cells: int, structure: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask, structure)
    large = [label for label in range(1, count + 1) if (labels == label).sum() >= least_cells]
    return np.isin(labels, large)


def drawn(seed: int, height: int, width: int, kind: str) -> np.ndarray:
    """A thumbnail with what its kind says, in random places."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 6 + 2, width // 6 + 2)).repeat(6, 0).repeat(6, 1)[:height, :width, None]
    stain = np.array([(214, 160, 198), (150, 90, 160), (228, 190, 222)])[rng.integers(0, 3, (height, width))]
    image = np.where(coarse < {"glass": 0.0, "full": 1.0}.get(kind, 0.4), stain, np.array(GLASS))
    if kind == "faint":
        image = 0.9 * np.array(GLASS) + 0.1 * image
    if kind == "pens":
        for ink, (row, column) in zip(INKS_RGB, rng.integers(0, (height, width), (4, 2)), strict=True):
            image[row : row + 9, column : column + 14] = ink
            image[row, column:] = 0.6 * image[row, column:] + 0.4 * np.array(ink)
    image = (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
    if kind == "faint":  # and a smoky patch, whose tint is weaker than the noise, and yet over Otsu's threshold
        image[height // 3 : height // 2, width // 3 : width // 2] = (131, 138, 135)
    return (255 - image) // 6 if kind == "dark" else image


def in_strips_of(strip_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "STRIP_CELLS", strip_cells)


@hypothesis_settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 999),
    height=st.integers(1, 61),
    width=st.integers(1, 67),
    kind=st.sampled_from(KINDS),
    strip_rows=st.integers(1, 70),
    unscanned=st.floats(0, 0.9),
)
def test_strips_change_no_cell(
    seed: int, height: int, width: int, kind: str, strip_rows: int, unscanned: float
) -> None:
    thumbnail = drawn(seed, height, width, kind)
    scanned = np.ones((height, width), np.bool_)
    scanned[: int(unscanned * height), width // 3 :] = False
    with pytest.MonkeyPatch.context() as patched:
        in_strips_of(strip_rows * width, patched)
        found = find_tissue(thumbnail, scanned)
        assert is_dark(thumbnail, scanned) == reference_is_dark(thumbnail, scanned)
    np.testing.assert_array_equal(found, reference(thumbnail, scanned))


@pytest.mark.parametrize("kind", KINDS)
def test_the_cases_are_what_they_are_called(kind: str) -> None:
    thumbnail, everywhere = drawn(1, 61, 67, kind), np.ones((61, 67), np.bool_)
    assert is_dark(thumbnail, everywhere) == (kind == "dark")
    assert (glass_level(thumbnail, everywhere)[0] == 245) == (kind in ("full", "dark"))
    assert kind == "dark" or (pen_mask(OpticalDensity(thumbnail, everywhere)).sum() > 200) == (kind == "pens")
    found = find_tissue(thumbnail, everywhere)
    np.testing.assert_array_equal(found, reference(thumbnail, everywhere))
    assert found.mean() == {"glass": 0.0, "faint": 0.0, "full": 1.0}.get(kind, pytest.approx(0.5, abs=0.45))


def test_the_largest_hole_that_is_filled() -> None:
    """Of 17 rows of 19 cells and some more, less what smoothing and closing take."""
    everywhere, filled = np.ones((60, 60), np.bool_), []
    for more in range(20):
        thumbnail = np.full((60, 60, 3), (150, 90, 160), np.uint8)
        thumbnail[:4] = thumbnail[20:37, 20:39] = thumbnail[37, 20 : 20 + more] = GLASS
        found = find_tissue(thumbnail, everywhere)
        np.testing.assert_array_equal(found, reference(thumbnail, everywhere))
        filled.append(bool(found[10:].all()))
    assert filled == sorted(filled, reverse=True)
    assert set(filled) == {True, False}


def test_where_nothing_was_scanned_is_no_tissue() -> None:
    thumbnail, nowhere = tissue_image(40, 30), np.zeros((30, 40), np.bool_)
    assert not is_dark(thumbnail, nowhere)
    assert not find_tissue(thumbnail, nowhere).any()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40, 64])
def test_densities_are_those_of_the_whole_plane_bit_for_bit(rows: int) -> None:
    thumbnail, everywhere = drawn(2, 40, 33, "pens"), np.ones((40, 33), np.bool_)
    assert smoothing_errors(thumbnail, rows) == 0
    density, expected = OpticalDensity(thumbnail, everywhere), reference_density(thumbnail, everywhere)
    np.testing.assert_array_equal(density.strip(slice(0, 40)), np.moveaxis(expected, 2, 0))


def smoothing_errors(thumbnail: np.ndarray, rows: int) -> int:
    """How many numbers differ from those of one filter over all."""
    height, everywhere = len(thumbnail), np.ones(thumbnail.shape[:2], np.bool_)
    density = OpticalDensity(thumbnail, everywhere)
    found = [density.smoothed(slice(top, min(height, top + rows))) for top in range(0, height, rows)]
    expected = ndimage.gaussian_filter(reference_density(thumbnail, everywhere), (0.7, 0.7, 0))
    return int((np.concatenate(found, axis=1) != np.moveaxis(expected, 2, 0)).sum())


def test_a_halo_that_is_one_row_too_small_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = OpticalDensity.strip

    def without_the_outermost_row(self: OpticalDensity, rows: slice) -> np.ndarray:
        density_chw = strip(self, rows)
        if rows.start > 0:
            density_chw[:, 0] = density_chw[:, 1]
        return density_chw

    thumbnail = drawn(2, 40, 33, "pens")
    monkeypatch.setattr(OpticalDensity, "strip", without_the_outermost_row)
    assert smoothing_errors(thumbnail, 8) > 0
    assert smoothing_errors(thumbnail, 40) == 0


@given(seed=st.integers(0, 999), cells=st.integers(1, 40), scanned=st.floats(0.05, 1))
def test_the_glass_is_that_of_medians(seed: int, cells: int, scanned: float) -> None:
    rng = np.random.default_rng(seed)
    thumbnail = rng.integers(225, 256, (cells, 7, 3), dtype=np.uint8)
    somewhere = rng.random((cells, 7)) < scanned
    somewhere[0, 0] = True
    np.testing.assert_array_equal(glass_level(thumbnail, somewhere), reference_glass(thumbnail, somewhere))


@given(seed=st.integers(0, 999), part=st.floats(0, 1), least=st.integers(1, 20), strip_cells=st.integers(1, 500))
def test_components_are_counted_in_strips(seed: int, part: float, least: int, strip_cells: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((19, 23)) < part
    counted = mask & (rng.random(mask.shape) < 0.1)
    with pytest.MonkeyPatch.context() as patched:
        in_strips_of(strip_cells, patched)
        np.testing.assert_array_equal(large_components(mask, least), reference_large(mask, least, CROSS))
        touching = large_components(mask, least, diagonally=True)
        np.testing.assert_array_equal(touching, reference_large(mask, least, SQUARE))
        propagated = large_components(mask, 1, counted=counted)
    np.testing.assert_array_equal(propagated, ndimage.binary_propagation(counted, mask=mask))


@given(rows=st.integers(0, 50), columns=st.integers(0, 50), least=st.integers(0, 3000))
def test_strips_are_all_rows_once(rows: int, columns: int, least: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        in_strips_of(200, patched)
        found = list(strips((rows, columns), least))
    assert [row for strip in found for row in range(strip.start, strip.stop)] == list(range(rows))
    assert all((strip.stop - strip.start) * columns <= max(200, least, columns) for strip in found)


@pytest.mark.parametrize("kind", KINDS)
def test_finding_tissue_takes_few_bytes_a_cell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float planes of three channels would take 12 bytes each, and a 64-bit index 8."""
    in_strips_of(1 << 14, monkeypatch)
    thumbnail = drawn(0, 700, 900, kind)
    scanned = np.ones(thumbnail.shape[:2], np.bool_)
    find_tissue(thumbnail[:50, :50], scanned[:50, :50])
    tracemalloc.start()
    find_tissue(thumbnail, scanned)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 13 * scanned.size


def test_a_mask_s_pixels_and_fraction_are_those_of_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = np.random.default_rng(0).random((9, 13)) < 0.4
    mask, size = TissueMask(cells, 7, Size(87, 60)), Size(87, 60)
    enlarged = np.kron(cells, np.ones((7, 7), np.bool_))[: size.height, : size.width]
    in_strips_of(30, monkeypatch)
    assert mask.fraction == enlarged.sum() / size.area
    for box in (Box(0, 0, 87, 60), Box(5, 8, 20, 30), Box(80, 55, 7, 5), Box(14, 21, 7, 7)):
        np.testing.assert_array_equal(mask.pixels(box), enlarged[box.rows_columns])
