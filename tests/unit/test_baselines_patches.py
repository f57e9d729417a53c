"""Which patches a slide has, and their pixels."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from slides_cases import texture, tissue_image, write_pyramid

from wholeslide.baselines import patches
from wholeslide.baselines.patches import patch_boxes, read_batches, tissue_patches
from wholeslide.geometry import Box, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.tissue import TissueMask
from wholeslide.slides.working import open_working_slide

KEEP = SlideConfig(background="keep")


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_boxes_cover_the_frame_and_stay_inside_where_they_fit(width: int, height: int, patch_px: int) -> None:
    boxes = patch_boxes(Size(width, height), patch_px)
    covered = np.zeros((max(height, patch_px), max(width, patch_px)), int)
    for box in boxes:
        assert box.size == Size(patch_px, patch_px)
        covered[box.rows_columns] += 1
    assert covered[:height, :width].min() >= 1
    assert Box.covering(Size(max(width, patch_px), max(height, patch_px))).contains(boxes[-1])
    assert len(boxes) == len(set(boxes)) == -(-width // patch_px) * -(-height // patch_px)
    assert boxes == sorted(boxes, key=lambda box: (box.top, box.left))


@example(10, 10, 25, 7, 1)  # a small slide, whose last cells reach over it
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.integers(1, 12), st.integers(0, 999))
def test_tissue_is_counted_pixel_by_pixel(width: int, height: int, patch_px: int, px_per_cell: int, seed: int) -> None:
    size = Size(width, height)
    shape = (-(-height // px_per_cell), -(-width // px_per_cell))
    mask = TissueMask(np.random.default_rng(seed).random(shape) < 0.5, px_per_cell, size)
    expected = [mask.pixels(box.intersection(Box.covering(size))).mean() for box in patch_boxes(size, patch_px)]
    assert patches._tissue_parts(mask, patch_px).tolist() == expected


def test_patches_of_tissue(tmp_path: Path) -> None:
    with closing(open_working_slide(write_pyramid(tmp_path / "a.tif", tissue_image()), SlideConfig())) as slide:
        for least in (0.0, 0.3, 0.5, 1.0):
            chosen = tissue_patches(slide, 64, least_tissue=least)
            assert chosen == [
                box for box in patch_boxes(slide.whole_size, 64) if slide.mask.pixels(box).mean() >= least
            ]
        assert 0 < len(chosen) < len(tissue_patches(slide, 64)) < 80


def test_all_patches_where_the_background_is_kept(tmp_path: Path) -> None:
    with closing(open_working_slide(write_pyramid(tmp_path / "a.tif", tissue_image()), KEEP)) as slide:
        assert tissue_patches(slide, 100, least_tissue=1.0) == patch_boxes(Size(640, 512), 100)


def test_a_slide_with_little_tissue_is_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(700, 560))
    with closing(open_working_slide(path, SlideConfig())) as slide, caplog.at_level(logging.WARNING):
        (box,) = tissue_patches(slide, 512, least_tissue=0.9)
        parts = [slide.mask.pixels(each).mean() for each in patch_boxes(slide.whole_size, 512)]
    assert patch_boxes(slide.whole_size, 512).index(box) == int(np.argmax(parts))
    assert caplog.messages == [
        f"{path}: no patch of 512 pixels is 90% tissue; the one with the most, {100 * max(parts):.0f}%, stands for the slide"
    ]


def test_a_small_slide_is_padded_with_background(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = texture(90, 150)
    path = write_pyramid(tmp_path / "a.tif", image, levels=1)
    with closing(open_working_slide(path, KEEP)) as slide, caplog.at_level(logging.WARNING):
        boxes = tissue_patches(slide, 128)
        (pixels,) = read_batches(slide, boxes, 4)
    assert boxes == [Box(0, 0, 128, 128), Box(0, 22, 128, 128)]
    np.testing.assert_array_equal(pixels[:, :, :90], np.stack([image[:128], image[22:]]))
    assert (pixels[:, :, 90:] == slide.background_rgb).all()
    assert caplog.messages == [f"{path}: its 90x150 pixels are padded with background to a patch of 128"]


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_batches_hold_the_pixels_in_order(tmp_path: Path, batch: int) -> None:
    image = texture(330, 200)
    with closing(open_working_slide(write_pyramid(tmp_path / "a.tif", image, levels=1), KEEP)) as slide:
        boxes = patch_boxes(slide.whole_size, 64)
        found = list(read_batches(slide, boxes, batch))
    assert [len(pixels) for pixels in found[:-1]] == [batch] * (len(found) - 1)
    np.testing.assert_array_equal(np.concatenate(found), np.stack([image[box.rows_columns] for box in boxes]))


def test_pixels_outside_the_tissue_are_as_they_are(tmp_path: Path) -> None:
    image = tissue_image()
    with closing(open_working_slide(write_pyramid(tmp_path / "a.tif", image), SlideConfig())) as slide:
        assert slide.background == "constant"
        (pixels,) = read_batches(slide, [Box(0, 0, 64, 64)], 1)
    np.testing.assert_array_equal(pixels[0], image[:64, :64])


def test_reading_ends_with_whoever_reads(tmp_path: Path) -> None:
    with closing(open_working_slide(write_pyramid(tmp_path / "a.tif", texture(640, 640)), KEEP)) as slide:
        batches = read_batches(slide, patch_boxes(slide.whole_size, 32), 8)
        assert next(batches).shape == (8, 32, 32, 3)
        batches.close()
