from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slides_cases import real_file, tissue_image, write_pyramid

from wholeslide.errors import RunError, SlideError
from wholeslide.geometry import Box
from wholeslide.slides import prepare as prepare_module
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.inspect import inspect_slide, write_overlay
from wholeslide.slides.prepare import estimate_prepared_bytes, find_prepared, prepare, prepare_slide
from wholeslide.slides.working import open_working_slide

KEYS = [
    *("file", "vendor", "width", "height", "levels", "mpp_x", "mpp_y"),
    *("tissue_fraction", "working_width", "working_height", "working_mpp"),
]


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "slide ß.tif", tissue_image(1500, 1300), mpp=1.0)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_prepared_slide_gives_the_view_of_the_original(tmp_path: Path, pyramid: Path, lossless: bool) -> None:
    config = SlideConfig(mpp=1.3)
    prepared = prepare_slide(pyramid, tmp_path / "cache", config, lossless=lossless)
    original, copy = open_working_slide(pyramid, config), open_working_slide(prepared.path, config)
    assert copy.size == original.size
    assert copy.whole_box == original.whole_box
    assert copy.key == original.key
    assert copy.background_rgb == original.background_rgb
    assert copy.tissue_fraction == original.tissue_fraction
    assert copy.working_mpp == original.working_mpp
    ours, theirs = (slide.read(Box.covering(slide.size)).astype(int) for slide in (copy, original))
    assert np.abs(ours - theirs).max() <= (0 if lossless else 24)
    assert np.abs(ours - theirs).mean() <= (0 if lossless else 2)
    original.close()
    copy.close()


def test_openslide_opens_a_prepared_slide_with_its_scale_and_nothing_else(tmp_path: Path, pyramid: Path) -> None:
    prepared = prepare_slide(pyramid, tmp_path, SlideConfig(mpp=1.0))
    with openslide.OpenSlide(prepared.path) as slide:
        assert slide.level_dimensions == ((1500, 1300), (375, 325))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(1.0)
        assert not slide.associated_images
        level_1 = np.asarray(slide.read_region((0, 0), 1, (375, 325)))[..., :3].astype(int)
    expected = tissue_image(1500, 1300).reshape(325, 4, 375, 4, 3).mean(axis=(1, 3))
    assert np.abs(level_1 - expected).max() < 32
    assert np.abs(level_1 - expected).mean() < 1.5
    with tifffile.TiffFile(prepared.path) as tiff:
        assert all(page.is_tiled for page in tiff.pages)


def test_what_is_there_is_skipped_and_found(tmp_path: Path, pyramid: Path) -> None:
    cache, config = tmp_path / "cache", SlideConfig()
    assert find_prepared(cache, pyramid, config) is None
    first = prepare_slide(pyramid, cache, config)
    second = prepare_slide(pyramid, cache, config)
    assert (first.was_there, second.was_there) == (False, True)
    assert find_prepared(cache, pyramid, config) == first.path
    assert find_prepared(cache, pyramid, SlideConfig(mpp=4.0)) is None
    assert find_prepared(cache, pyramid, config, mpp=1.1) is None
    assert [file.name for file in cache.iterdir()] == [first.path.name]


def test_other_options_and_damage_are_refused(tmp_path: Path, pyramid: Path) -> None:
    prepared = prepare_slide(pyramid, tmp_path, SlideConfig()).path
    with pytest.raises(SlideError, match=r"prepared with other options .*: prepare the original again"):
        open_working_slide(prepared, SlideConfig(mpp=4.0))
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(prepared.read_bytes().replace(b'"mask_shape"', b'"mask_xhape"'))
    with pytest.raises(SlideError, match="description is damaged"):
        open_working_slide(damaged, SlideConfig())
    damaged.write_bytes(prepared.read_bytes().replace(b'{"wholeslide_prepared": 1', b'{"wholeslide_prepared": 9'))
    with pytest.raises(SlideError, match="prepared in format 9, not 1"):
        open_working_slide(damaged, SlideConfig())


def test_the_estimate_is_near(tmp_path: Path, pyramid: Path) -> None:
    slide = open_working_slide(pyramid, SlideConfig(mpp=1.0))
    estimate = estimate_prepared_bytes(slide)
    slide.close()
    assert prepare_slide(pyramid, tmp_path, SlideConfig(mpp=1.0)).size_bytes == pytest.approx(estimate, rel=0.2)


def test_a_disk_that_would_be_full_is_seen_before_writing(
    tmp_path: Path, pyramid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"the disk is full: about .* MiB are needed, 0 are free .*: free some space"):
        prepare_slide(pyramid, tmp_path / "cache", SlideConfig())
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_write_that_fails(
    tmp_path: Path, pyramid: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    original = prepare_module._cut_tiles

    def fail_late(*args: object) -> object:
        for count, tile in enumerate(original(*args)):
            if count == 5:
                raise error
            yield tile

    monkeypatch.setattr(prepare_module, "_cut_tiles", fail_late)
    expected = RunError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        prepare_slide(pyramid, tmp_path / "cache", SlideConfig(mpp=1.0))
    assert not list((tmp_path / "cache").iterdir())


KILLED_LATE = """
import os, sys
from pathlib import Path
from wholeslide.slides import prepare
from wholeslide.slides.config import SlideConfig
cut_tiles = prepare._cut_tiles
def killed_late(*args):
    for count, tile in enumerate(cut_tiles(*args)):
        if count == 5:
            os.kill(os.getpid(), 9)
        yield tile
prepare._cut_tiles = killed_late
prepare.prepare([(Path(sys.argv[1]), None)], Path(sys.argv[2]), SlideConfig(mpp=1.0))
"""


def test_what_a_killed_run_had_begun_is_removed(tmp_path: Path, pyramid: Path) -> None:
    cache = tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", KILLED_LATE, str(pyramid), str(cache)], check=False)
    assert killed.returncode == -9
    left = [path.name for path in cache.iterdir()]
    assert any(name.startswith(".spool-") for name in left), left
    assert any(name.endswith(".part") for name in left), left
    (cache / "mine.part").write_text("of another program")
    done = prepare([(pyramid, None)], cache, SlideConfig(mpp=1.0))
    assert {path.name for path in cache.iterdir()} == {done[0].path.name, "mine.part"}


def test_bad_slides_are_reported_together_after_the_good_ones(tmp_path: Path, pyramid: Path) -> None:
    (tmp_path / "bad.svs").write_text("x")
    told = []
    rows = [(tmp_path / "bad.svs", None), (pyramid, None), (tmp_path / "gone.svs", None)]
    with pytest.raises(SlideError) as caught:
        prepare(rows, tmp_path / "cache", SlideConfig(), progress=told.append)
    assert [Path(problem.where).name for problem in caught.value.problems] == ["bad.svs", "gone.svs"]
    assert len(told) == len(list((tmp_path / "cache").iterdir())) == 1


def test_inspect_has_the_agreed_keys(tmp_path: Path, pyramid: Path) -> None:
    facts = inspect_slide(pyramid, SlideConfig())
    assert list(facts) == KEYS
    json.dumps(facts)
    assert facts["levels"] == [
        {"width": 1500, "height": 1300, "downsample": 1.0},
        {"width": 750, "height": 650, "downsample": 2.0},
    ]
    assert facts["working_mpp"] == pytest.approx(2.0)
    Image.fromarray(tissue_image()).save(tmp_path / "a.png")
    plain = inspect_slide(tmp_path / "a.png", SlideConfig(mpp="native"))
    assert (plain["vendor"], plain["mpp_x"], plain["working_mpp"]) == ("png", None, None)


def test_inspect_reads_pixels() -> None:
    with pytest.raises(SlideError, match="Bogus marker length"):
        inspect_slide(real_file("slides/openslide-fixtures/unreadable.svs"), SlideConfig())


def test_overlay_outlines_the_tissue(tmp_path: Path, pyramid: Path) -> None:
    out = write_overlay(pyramid, tmp_path / "overlays" / "pyramid.png", SlideConfig())
    assert out == tmp_path / "overlays" / "pyramid.png"
    picture = np.asarray(Image.open(out)).astype(int)
    assert picture.shape == (650, 750, 3)
    outline = (picture == (0, 160, 0)).all(axis=2)
    assert 1000 < outline.sum() < 30000
    assert not outline[325, 375]
    assert not outline[:20].any()


def test_an_overlay_that_cannot_be_written_is_a_clear_error(tmp_path: Path, pyramid: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written: .*: check the folder"):
        write_overlay(pyramid, tmp_path / "file" / "sub" / "a.png", SlideConfig())
