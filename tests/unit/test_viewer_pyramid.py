"""The viewer's tiles against OpenSlide's own Deep Zoom, and against the pixels that were written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image
from slides_cases import real_file, texture, tissue_image, write_pyramid

from wholeslide.errors import SlideError
from wholeslide.geometry import Size
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import SlideReader
from wholeslide.viewer.pixels import SlidePixels
from wholeslide.viewer.pyramid import TILE_PX, Tile, TilePyramid


def stitched(pixels: SlidePixels, pyramid: TilePyramid, level: int) -> np.ndarray:
    """A whole level."""
    rows = []
    for row in range(10_000):
        tiles = [Tile(level, column, row) for column in range(10_000) if pyramid.box(Tile(level, column, row))]
        if not tiles:
            return np.concatenate(rows)
        rows.append(np.concatenate([pixels.tile(0, tile) for tile in tiles], axis=1))
    raise AssertionError


def error_db(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((found.astype(float) - wanted) ** 2))))


@pytest.mark.parametrize(
    "name", ["slides/cmu_small_region.svs", "slides/dicom-wsi.dcm", "slides/fluorescence-dapi.ndpi"]
)
def test_as_openslide_has_it(name: str) -> None:
    path = real_file(name)
    with openslide.OpenSlide(path) as slide:
        theirs = DeepZoomGenerator(slide, tile_size=TILE_PX, overlap=0, limit_bounds=False)
        pyramid = TilePyramid(Size(*slide.dimensions))
        assert pyramid.finest == theirs.level_count - 1
        pixels = SlidePixels(lambda _: open_slide(path))
        for level in range(pyramid.coarsest, pyramid.finest + 1):
            columns, rows = theirs.level_tiles[level]
            assert pyramid.box(Tile(level, columns, 0)) is None
            assert pyramid.box(Tile(level, 0, rows)) is None
            for column, row in {(0, 0), (columns // 2, rows // 2), (columns - 1, rows - 1)}:
                wanted = np.asarray(theirs.get_tile(level, (column, row)))
                found = pixels.tile(0, Tile(level, column, row))
                assert (
                    np.abs(np.subtract(found.shape, wanted.shape)).max() <= 1
                )  # theirs drops what is less than a pixel
                height, width = np.minimum(found.shape, wanted.shape)[:2]
                found, wanted = found[:height, :width], wanted[:height, :width]
                shift = np.roll(wanted, 3, axis=1)
                assert error_db(found, wanted) > min(27, error_db(found, shift) + 3) or wanted.std() < 2
        pixels.close()


def test_each_level_is_the_mean_of_level_0(tmp_path: Path) -> None:
    image = tissue_image(1301, 1111)
    path = write_pyramid(tmp_path / "slide.tif", image, levels=1)
    pixels = SlidePixels(lambda _: open_slide(path))
    pyramid = TilePyramid(Size(1301, 1111))
    assert (pyramid.coarsest, pyramid.finest) == (8, 11)
    for level in range(8, 12):
        step = 2 ** (11 - level)
        found = stitched(pixels, pyramid, level)
        assert found.shape[:2] == (-(-1111 // step), -(-1301 // step))
        rows, columns = 1111 // step, 1301 // step
        means = image[: rows * step, : columns * step].reshape(rows, step, columns, step, 3).mean(axis=(1, 3))
        assert np.abs(found[:rows, :columns] - means).max() <= 1
    pixels.close()


def test_what_no_level_is_near_is_made_of_finer_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = texture(5000, 700)
    Image.fromarray(image).save(tmp_path / "flat.png")
    reader = open_slide(tmp_path / "flat.png")
    sides: list[int] = []
    read_inside = reader._read_inside

    def spy(level: int, level_box, background_rgb):  # type: ignore[no-untyped-def]
        sides.append(max(level_box.width, level_box.height))
        return read_inside(level, level_box, background_rgb)

    monkeypatch.setattr(reader, "_read_inside", spy)
    pixels = SlidePixels(lambda _: reader)
    pyramid = TilePyramid(Size(5000, 700))
    found = pixels.tile(0, Tile(pyramid.coarsest, 0, 0))
    step = pyramid.l0_px(pyramid.coarsest)
    assert (step, max(sides)) == (32, 2048)
    means = image[:672, :4992].reshape(21, 32, 156, 32, 3).mean(axis=(1, 3))
    assert np.abs(found[:21, :156] - means).max() <= 4  # rounded twice more
    read = len(sides)
    pixels.tile(0, Tile(pyramid.coarsest + 1, 0, 0))
    assert len(sides) == read  # it was kept
    pixels.close()


def test_more_slides_than_are_kept_open_and_many_who_ask(tmp_path: Path) -> None:
    images = [texture(300, 280, seed) for seed in range(12)]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    opened: list[SlideReader] = []

    def open_one(number: int) -> SlideReader:
        opened.append(open_slide(tmp_path / f"{number}.png"))
        return opened[-1]

    pixels = SlidePixels(open_one)
    asked = [(number, column) for number in range(12) for column in (0, 1)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: pixels.tile(one[0], Tile(9, one[1], 0)), asked))
    for (number, column), tile in zip(asked, found, strict=True):
        assert np.array_equal(tile, images[number][:256, column * 256 : column * 256 + 256])
    assert sum(not reader._closed for reader in opened) <= 8
    pixels.close()
    assert all(reader._closed for reader in opened)


def test_a_slide_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"II*\0 and then nothing")
    pixels = SlidePixels(lambda _: open_slide(tmp_path / "broken.svs"))
    with pytest.raises(SlideError, match="broken"):
        pixels.tile(0, Tile(8, 0, 0))
