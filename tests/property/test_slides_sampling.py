"""Pixels do not depend on the box that they are read with, and area averaging is what its definition says."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.augment import Orientation, draw_augmentation
from wholeslide.slides.config import AugmentationConfig
from wholeslide.slides.readers import Level, Pixels, Rgb, SlideReader
from wholeslide.slides.resample import AxisMap, Resampling
from wholeslide.slides.scale import sample_at
from wholeslide.slides.tissue import TissueMask
from wholeslide.slides.view import make_view
from wholeslide.slides.working import WorkingSlide

ratios = st.one_of(st.integers(1, 9).map(float), st.floats(1.0, 9.0))


class ArrayReader(SlideReader):
    """Levels that are arrays: level 0 is random, each next one has half its side."""

    def __init__(self, size: Size, levels: int, seed: int = 0) -> None:
        super().__init__(Path("array"))
        rng = np.random.default_rng(seed)
        self.arrays = [rng.integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)]
        for _ in range(levels - 1):
            self.arrays.append(self.arrays[-1][::2, ::2].copy())
        self.levels = tuple(Level.of(Size(a.shape[1], a.shape[0]), size) for a in self.arrays)
        self.vendor, self.is_plain_image = "array", False
        self.l0_mpp = Mpp(0.5, 0.5)
        self.l0_bounds = Box.covering(size)

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        return self.arrays[level][level_box.rows_columns].copy()

    def _release(self) -> None:
        pass


def make_slide(size: Size, x: float, y: float, *, levels: int = 1, px_per_cell: int = 5, seed: int = 0) -> WorkingSlide:
    reader = ArrayReader(size, levels, seed)
    sampling = sample_at(reader, x, y, snap=True)
    shape = (-(-sampling.size.height // px_per_cell), -(-sampling.size.width // px_per_cell))
    cells = np.random.default_rng(seed).random(shape) < 0.7
    cells[shape[0] // 2, shape[1] // 2] = True
    return WorkingSlide(
        reader,
        sampling,
        TissueMask(cells, px_per_cell, sampling.size),
        working_mpp=None,
        background="constant",
        background_rgb=(255, 255, 255),
        make_key=lambda: "key",
    )


@st.composite
def boxes(draw: st.DrawFn, size: Size) -> Box:
    left, top = draw(st.integers(0, size.width - 1)), draw(st.integers(0, size.height - 1))
    return Box(left, top, draw(st.integers(1, size.width - left)), draw(st.integers(1, size.height - top)))


def exact_average(level: np.ndarray, axis: AxisMap, count: int) -> np.ndarray:
    """The definition, in float64: the integral of the level's step function over each working pixel."""
    integral = np.concatenate([np.zeros((1, *level.shape[1:])), np.cumsum(level.astype(np.float64), axis=0)])

    def up_to(position: float) -> np.ndarray:
        whole = int(np.floor(position))
        part = level[whole] * (position - whole) if whole < len(level) else 0.0
        return integral[whole] + part

    edges = [min(axis.origin + i * axis.ratio, len(level)) for i in range(count + 1)]
    return np.stack([(up_to(stop) - up_to(start)) / axis.ratio for start, stop in itertools.pairwise(edges)])


@given(ratio_x=ratios, ratio_y=ratios, origin=st.integers(0, 3), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_area_average_equals_its_definition(ratio_x: float, ratio_y: float, origin: int, seed: int) -> None:
    level = np.random.default_rng(seed).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    x, y = AxisMap(origin, ratio_x), AxisMap(origin, ratio_y)
    px_box = Box(0, 0, int((70 - origin) / ratio_x), int((60 - origin) / ratio_y))
    resampling = Resampling(x, y)
    ours = resampling.average(level[resampling.level_box(px_box).rows_columns], px_box)
    rows = exact_average(level, y, px_box.height)
    exact = exact_average(rows.transpose(1, 0, 2), x, px_box.width).transpose(1, 0, 2)
    assert np.abs(ours - exact).max() <= 0.5 + 1e-3


@given(data=st.data(), x=st.floats(1.0, 11.0), y=st.floats(1.0, 11.0), levels=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_a_box_is_the_same_part_of_the_whole(data: st.DataObject, x: float, y: float, levels: int) -> None:
    slide = make_slide(Size(401, 377), x, y, levels=levels)
    box = data.draw(boxes(slide.size))
    whole = slide.read(Box.covering(slide.size))
    np.testing.assert_array_equal(slide.read(box), whole[box.rows_columns])


@pytest.mark.parametrize("chunk", [40, 64])
def test_chunks_do_not_change_pixels(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    slide = make_slide(Size(301, 277), 2.3, 3.7)
    whole = slide.read(Box.covering(slide.size))
    monkeypatch.setattr("wholeslide.slides.working.CHUNK_LEVEL_PX", chunk)
    np.testing.assert_array_equal(slide.read(Box.covering(slide.size)), whole)


@given(
    data=st.data(), mirrored=st.booleans(), turns=st.integers(0, 3), width=st.integers(1, 9), height=st.integers(1, 9)
)
def test_reading_and_orienting_commute(
    data: st.DataObject, mirrored: bool, turns: int, width: int, height: int
) -> None:
    orientation, source = Orientation(mirrored, turns), Size(width, height)
    image = np.arange(width * height).reshape(height, width)
    whole = orientation.apply(image)
    assert (whole.shape[1], whole.shape[0]) == (orientation.size(source).width, orientation.size(source).height)
    box = data.draw(boxes(orientation.size(source)))
    part = orientation.apply(image[orientation.source_box(box, source).rows_columns])
    np.testing.assert_array_equal(part, whole[box.rows_columns])


@given(data=st.data(), seed=st.integers(0, 10_000), in_memory=st.booleans())
@settings(max_examples=80, deadline=None)
def test_an_augmented_box_equals_the_operations_on_the_whole_image(
    data: st.DataObject, seed: int, in_memory: bool
) -> None:
    slide = make_slide(Size(203, 177), 2.5, 1.7, seed=seed % 7)
    view = make_view(
        slide,
        augmentation=AugmentationConfig(),
        rng=np.random.default_rng(seed),
        mean_grey=0.6,
        padded_size=lambda size: Size(size.width + 9, size.height + 4),
    )
    drawn = view.augmentation
    image = slide.read(Box.covering(slide.size))[drawn.crop_box.rows_columns]
    image = np.rot90(image[:, ::-1] if drawn.orientation.mirrored else image, drawn.orientation.turns)
    image = np.pad(image, ((0, 4), (0, 9), (0, 0)), constant_values=255)
    assert drawn.jitter is not None
    matrix, offset = np.array(drawn.jitter.matrix), np.array(drawn.jitter.offset)
    expected = np.clip(image / 255 @ matrix.T + offset, 0, 1)
    if in_memory:
        view.prefetch(10**9)
    whole = view.read(Box.covering(view.size))
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    box = data.draw(boxes(view.size))
    np.testing.assert_array_equal(view.read(box), whole[box.rows_columns])


@given(seed=st.integers(0, 10_000), width=st.sampled_from([40, 2999, 3000, 9000]))
def test_crops_keep_their_minimum_and_stay_inside(seed: int, width: int) -> None:
    size = Size(width, 5000)
    drawn = draw_augmentation(size, AugmentationConfig(), np.random.default_rng(seed), 0.5)
    assert Box.covering(size).contains(drawn.crop_box)
    minimum = 0.9 if width < 3000 else 0.5
    assert drawn.crop_box.width >= round(minimum * width)
    assert drawn.crop_box.height >= 2500


def test_a_plain_view_is_the_slide_and_draws_repeat() -> None:
    slide = make_slide(Size(203, 177), 2.5, 1.7)
    plain = make_view(slide)
    np.testing.assert_allclose(plain.read(Box.covering(plain.size)), slide.read(Box.covering(slide.size)), atol=1e-4)
    draws = {
        draw_augmentation(slide.size, AugmentationConfig(), np.random.default_rng(seed), 0.5) for seed in (1, 1, 2)
    }
    assert len(draws) == 2
