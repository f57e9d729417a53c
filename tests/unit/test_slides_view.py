from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slides_cases import tissue_image, write_pyramid

from wholeslide.errors import ConfigError, SlideError
from wholeslide.geometry import Box, Size
from wholeslide.slides.augment import ColourJitter
from wholeslide.slides.config import AugmentationConfig, SlideConfig
from wholeslide.slides.readers import ReaderClosedError
from wholeslide.slides.statistics import tissue_statistics
from wholeslide.slides.view import make_view
from wholeslide.slides.working import WorkingSlide, open_working_slide

IDENTITY = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "mean_grey": 0.3}


@pytest.fixture
def slide(tmp_path: Path) -> WorkingSlide:
    opened = open_working_slide(write_pyramid(tmp_path / "a.tif", tissue_image()), SlideConfig())
    yield opened
    opened.close()


def jittered(**changes: float) -> np.ndarray:
    pixels = np.array([[[200, 100, 40], [10, 20, 30]]], np.uint8)
    return ColourJitter.compose(**(IDENTITY | changes)).apply(pixels) * 255


def test_jitter_does_what_its_names_say() -> None:
    pixels = np.array([[[200, 100, 40], [10, 20, 30]]], np.float64)
    grey = pixels @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(jittered(), pixels, atol=0.05)
    np.testing.assert_allclose(jittered(brightness=1.1), pixels * 1.1, atol=0.05)
    np.testing.assert_allclose(jittered(contrast=0.9), pixels * 0.9 + 0.1 * 0.3 * 255, atol=0.05)
    np.testing.assert_allclose(jittered(saturation=0.0), np.repeat(grey[..., None], 3, axis=2), atol=0.05)
    turned = jittered(hue=0.1)
    np.testing.assert_allclose(turned @ [0.299, 0.587, 0.114], grey, atol=0.2)
    assert np.abs(turned - pixels).max() > 10
    assert jittered(brightness=2.0).max() == 255


def test_padding_equals_the_jittered_background(slide: WorkingSlide) -> None:
    view = make_view(
        slide,
        augmentation=AugmentationConfig(crop_probability=0, flips=False, turns=False),
        rng=np.random.default_rng(1),
        padded_size=lambda size: Size(size.width + 8, size.height + 8),
    )
    whole = view.read(Box.covering(view.size))
    masked = ~slide.mask.pixels(slide.whole_box)
    background = np.unique(whole[: slide.size.height, : slide.size.width][masked], axis=0)
    assert len(background) == 1
    assert (whole[slide.size.height :] == background[0]).all()
    assert (whole[:, slide.size.width :] == background[0]).all()


def test_much_padding_is_announced_once_a_slide(slide: WorkingSlide, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wholeslide.slides.view"):
        for _ in range(3):
            make_view(slide, padded_size=lambda size: Size(size.width + 500, size.height))
    assert [record.getMessage() for record in caplog.records] == [
        f"{slide.path}: the view of {slide.size} pixels is padded with background to "
        f"{slide.size.width + 500}x{slide.size.height}, the least that the network takes"
    ]


def test_prefetch_keeps_to_its_limit_and_serves_from_memory(
    slide: WorkingSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = make_view(slide)
    whole = view.read(Box.covering(view.size))
    reads = []
    original = slide.read
    monkeypatch.setattr(slide, "read", lambda box: (reads.append(box), original(box))[1])
    view.prefetch(slide.size.area * 3 - 1)
    assert not reads
    view.prefetch(slide.size.area * 3)
    assert len(reads) == 1
    np.testing.assert_array_equal(view.read(Box.covering(view.size)), whole)
    assert len(reads) == 1


def test_closing_ends_a_prefetch_and_later_reads_fail(slide: WorkingSlide) -> None:
    view = make_view(slide)
    view.close()
    view.close()
    view.prefetch(10**9)
    with pytest.raises(ReaderClosedError, match="closed before it was read"):
        view.read(Box(view.size.width // 2, view.size.height // 2, 4, 4))


def test_reads_from_many_threads_agree(slide: WorkingSlide) -> None:
    view = make_view(slide)
    whole = view.read(Box.covering(view.size))
    wrong: list[Box] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            left, top = int(rng.integers(view.size.width - 20)), int(rng.integers(view.size.height - 20))
            box = Box(left, top, 20, 20)
            if not np.array_equal(view.read(box), whole[box.rows_columns]):
                wrong.append(box)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_statistics_are_of_tissue_only_and_repeat(slide: WorkingSlide, tmp_path: Path) -> None:
    everything = tissue_statistics([slide], seed=0, max_pixels=10**9)
    tissue = slide.read(Box.covering(slide.size))[slide.mask.pixels(slide.whole_box)] / 255
    np.testing.assert_allclose(everything.mean, tissue.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(everything.std, tissue.std(axis=0), atol=1e-9)
    assert everything.mean_grey == pytest.approx(float(tissue.mean(axis=0) @ [0.299, 0.587, 0.114]))
    assert everything.pixels == len(tissue)
    Image.fromarray(np.full((300, 300, 3), 200, np.uint8)).save(tmp_path / "b.png")
    other = open_working_slide(tmp_path / "b.png", SlideConfig(mpp="native"))
    one = tissue_statistics([slide, other], seed=3, max_pixels=70_000)
    assert one == tissue_statistics(iter([other, slide]), seed=3, max_pixels=70_000)
    assert one.pixels < everything.pixels + 90_000


def test_statistics_of_nothing_are_an_error() -> None:
    with pytest.raises(SlideError, match=r"no tissue to take colours from \(training split\)"):
        tissue_statistics([], seed=0, max_pixels=100)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mpp": 30.0}, r"not a resolution \(--mpp 30\.0\): give a value between 0\.05 and 20"),
        ({"magnification": 0.0}, r"not a magnification \(--magnification 0\.0\)"),
        ({"mpp": 1.0, "magnification": 5.0}, r"two resolutions that disagree .*magnification 5 is 2 mpp"),
        ({"downsample": 1.5}, r"not a downsample \(--downsample 1\.5\): give a whole number"),
        ({"downsample": 2.0, "magnification": 5.0}, r"two resolutions \(--downsample 2\.0\)"),
        ({"mpp_override": 0.001}, r"not a scale \(--mpp-override 0\.001\)"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SlideConfig(**options)


def test_all_problems_of_the_options_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentationConfig(crop_probability=2, crop_minimum=0, jitter=3)
    assert len(caught.value.problems) == 3


def test_magnification_stands_for_mpp() -> None:
    assert SlideConfig(magnification=20).target_mpp == 0.5
    assert SlideConfig(mpp=0.5, magnification=20).target_mpp == 0.5
    assert SlideConfig(downsample=2).target_mpp is None
    assert SlideConfig(downsample=2).target_downsample == 2
