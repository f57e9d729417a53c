"""ICC profiles: colours as the scanner meant them."""

from __future__ import annotations

import io
import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from slides_cases import real_file, texture, tissue_image

from wholeslide.errors import SlideError
from wholeslide.geometry import Box
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.content import slide_key
from wholeslide.slides.opening import open_slide
from wholeslide.slides.working import open_working_slide

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def test_the_profile_of_a_slide_is_applied_as_by_the_library() -> None:
    path = real_file("slides/dicom-wsi.dcm")
    box = Box(300, 900, 200, 180)
    with closing(open_slide(path)) as stored, closing(open_slide(path, icc=True)) as corrected:
        assert stored.icc_profile is not None
        pixels = stored.read_level(0, box)
        profile = ImageCms.getOpenProfile(io.BytesIO(stored.icc_profile))
        expected = np.asarray(ImageCms.profileToProfile(Image.fromarray(pixels), profile, SRGB, outputMode="RGB"))
        found = corrected.read_level(0, box)
    np.testing.assert_array_equal(found, expected)
    assert (found != pixels).any()


def test_what_lies_outside_keeps_the_background(tmp_path: Path) -> None:
    path = real_file("slides/dicom-wsi.dcm")
    with closing(open_slide(path, icc=True)) as reader:
        pixels = reader.read_level(0, Box(-10, -10, 20, 20), (1, 2, 3))
    assert (pixels[:10] == (1, 2, 3)).all()


def test_srgb_in_a_picture_changes_nothing(tmp_path: Path) -> None:
    image = tissue_image(200, 150)
    Image.fromarray(image).save(tmp_path / "a.png", icc_profile=SRGB.tobytes())
    with closing(open_slide(tmp_path / "a.png", icc=True)) as reader:
        found = reader.read_level(0, Box(0, 0, 200, 150))
    assert np.abs(found.astype(int) - image).max() <= 1


def test_a_file_without_a_profile_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(texture(200, 150)).save(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_slide(tmp_path / "a.png", icc=True).close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.png'}: no ICC profile in it; its colours are taken as they are stored"
    ]


def test_a_damaged_profile_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(texture(200, 150)).save(tmp_path / "a.png", icc_profile=b"not a profile")
    with pytest.raises(SlideError, match=r"its ICC profile cannot be used.*a\.png.*leave --icc out"):
        open_slide(tmp_path / "a.png", icc=True)
    open_slide(tmp_path / "a.png").close()


def test_corrected_pixels_are_other_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(tissue_image(200, 150)).save(path, icc_profile=SRGB.tobytes())
    stored, corrected = SlideConfig(mpp="native"), SlideConfig(mpp="native", icc=True)
    assert slide_key(path, stored) != slide_key(path, corrected)
    assert slide_key(path, stored) == slide_key(path, SlideConfig(mpp="native", decoders="processes"))
    open_working_slide(path, corrected).close()
