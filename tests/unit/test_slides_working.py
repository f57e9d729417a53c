from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slides_cases import GLASS, real_file, texture, tissue_image, write_ome, write_pyramid

from wholeslide.errors import SlideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.content import content_hash, slide_key
from wholeslide.slides.working import WorkingSlide, open_working_slide

KEEP = SlideConfig(background="keep")


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "a.tif", tissue_image(), mpp=1.0, levels=3)


def closed(slide: WorkingSlide) -> WorkingSlide:
    slide.close()
    return slide


@pytest.mark.parametrize(
    ("mpp", "level", "ratio", "size"),
    [
        (1.0, 0, 1.0, Size(640, 512)),
        (0.985, 0, 1.0, Size(640, 512)),
        (1.03, 0, 1.03, Size(621, 497)),
        (1.97, 1, 1.0, Size(320, 256)),
        (2.0, 1, 1.0, Size(320, 256)),
        (3.0, 1, 1.5, Size(213, 170)),
        (4.1, 2, 1.025, Size(156, 124)),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    pyramid: Path, mpp: float, level: int, ratio: float, size: Size
) -> None:
    slide = closed(open_working_slide(pyramid, SlideConfig(mpp=mpp, background="keep")))
    assert slide.sampling.level == level
    assert slide.sampling.resampling.x.ratio == pytest.approx(ratio)
    assert slide.size == size
    assert slide.working_mpp is not None
    assert slide.working_mpp.x == pytest.approx(slide.sampling.downsample_x)


def test_stored_pixels_within_two_percent_are_a_plain_copy(tmp_path: Path) -> None:
    image = texture(200, 150)
    slide = open_working_slide(write_pyramid(tmp_path / "a.tif", image, mpp=1.98, levels=1), KEEP)
    np.testing.assert_array_equal(slide.read(Box.covering(slide.size)), image)
    assert slide.working_mpp is not None
    assert slide.working_mpp.x == pytest.approx(1.98)
    slide.close()


def test_finer_than_stored_is_an_error(pyramid: Path) -> None:
    text = r"0\.5 microns per pixel asked for, but only 1 stored .*a\.tif\): leave .*, or train at --mpp 1 or coarser"
    with pytest.raises(SlideError, match=text):
        open_working_slide(pyramid, SlideConfig(mpp=0.5))


def test_a_missing_scale_says_every_way_to_give_it(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(), mpp=None)
    with pytest.raises(
        SlideError, match=r"no usable scale .*a\.tif\): .*--mpp-override.*column mpp.*native.*--downsample N"
    ):
        open_working_slide(path, SlideConfig())
    for config, mpp in (
        (SlideConfig(), 1.0),
        (SlideConfig(mpp_override=1.0), None),
        (SlideConfig(mpp_override=1.0), 0.25),
        (SlideConfig(downsample=2), None),
    ):
        slide = closed(open_working_slide(path, config, mpp=mpp))
        assert slide.whole_size == Size(320, 256), (config, mpp)
    native = closed(open_working_slide(path, SlideConfig(mpp="native")))
    assert native.whole_size == Size(640, 512)
    assert native.working_mpp is None


def test_a_wrong_mpp_column_is_an_error(pyramid: Path) -> None:
    with pytest.raises(SlideError, match=r"mpp 250 is not a slide's scale .*between 0\.05 and 20"):
        open_working_slide(pyramid, SlideConfig(), mpp=250.0)


def test_small_slides_and_empty_slides_are_errors(tmp_path: Path) -> None:
    Image.fromarray(texture(60, 31)).save(tmp_path / "small.png")
    with pytest.raises(SlideError, match=r"only 60x31 pixels at the working resolution; 32 a side are needed .*small"):
        open_working_slide(tmp_path / "small.png", SlideConfig(mpp="native"))
    glass = np.full((300, 400, 3), GLASS, np.uint8)
    path = write_pyramid(tmp_path / "glass.tif", glass)
    with pytest.raises(SlideError, match=r"no tissue found .*glass\.tif\): look at it .*--background keep"):
        open_working_slide(path, SlideConfig())
    assert closed(open_working_slide(path, KEEP)).tissue_fraction == 1.0


def test_slides_are_masked_and_cropped_and_plain_images_kept(tmp_path: Path, pyramid: Path) -> None:
    slide = open_working_slide(pyramid, SlideConfig(mpp=1.0))
    assert slide.background == "constant"
    ellipse = np.pi / 16
    assert ellipse < slide.tissue_fraction < 1.35 * ellipse
    assert Box(140, 110, 360, 292).contains(slide.whole_box)
    assert slide.whole_box.contains(Box(165, 133, 310, 246))
    assert slide.l0_box == slide.whole_box
    pixels = slide.read(Box.covering(slide.size))
    mask = slide.mask.pixels(slide.whole_box)
    assert (pixels[~mask] == 255).all()
    original = tissue_image()[slide.whole_box.rows_columns]
    np.testing.assert_array_equal(pixels[mask], original[mask])
    slide.close()
    Image.fromarray(tissue_image()).save(tmp_path / "a.png")
    image = closed(open_working_slide(tmp_path / "a.png", SlideConfig(mpp="native")))
    assert (image.background, image.tissue_fraction, image.size) == ("keep", 1.0, Size(640, 512))


def test_boxes_without_tissue_are_not_decoded(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_working_slide(pyramid, SlideConfig(mpp=1.0))
    slide.mask.cells[:4] = False
    monkeypatch.setattr(slide.reader, "_read_inside", lambda *_: pytest.fail("decoded"))
    assert (slide._read(Box(0, 0, 640, 16), masked=True) == 255).all()
    slide.close()


def test_anisotropic_pixels_become_square(tmp_path: Path) -> None:
    path = write_ome(tmp_path / "a.ome.tif", tissue_image(640, 512))
    path.write_bytes(path.read_bytes().replace(b'PhysicalSizeY="0.5"', b'PhysicalSizeY="1.0"'))
    slide = closed(open_working_slide(path, SlideConfig(mpp=2.0)))
    assert slide.whole_size == Size(160, 256)
    assert slide.working_mpp == Mpp(2.0, 2.0)


def test_the_key_follows_content_and_parameters_not_the_name(tmp_path: Path, pyramid: Path) -> None:
    copy = tmp_path / "b.tif"
    copy.write_bytes(pyramid.read_bytes())
    key = slide_key(pyramid, SlideConfig())
    assert slide_key(copy, SlideConfig()) == key
    assert slide_key(pyramid, SlideConfig(magnification=5)) == key
    others = [
        SlideConfig(mpp=4.0),
        SlideConfig(background="keep"),
        SlideConfig(mpp_override=1.1),
        SlideConfig(downsample=2),
    ]
    assert len({key, slide_key(pyramid, SlideConfig(), 1.0), *(slide_key(pyramid, other) for other in others)}) == 6
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert content_hash(copy) != content_hash(pyramid)


def geojson(*rings: list[tuple[float, float]]) -> dict[str, object]:
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": rings}, "properties": {}}


def test_a_qupath_mask_replaces_the_automatic_one(tmp_path: Path, pyramid: Path) -> None:
    outer = [(64.0, 32.0), (256.0, 32.0), (256.0, 224.0), (64.0, 224.0), (64.0, 32.0)]
    hole = [(128.0, 96.0), (192.0, 96.0), (192.0, 160.0), (128.0, 160.0), (128.0, 96.0)]
    far = {"type": "MultiPolygon", "coordinates": [[[(400, 400), (432, 400), (432, 432), (400, 432)]]]}
    collection = {"type": "FeatureCollection", "features": [geojson(outer, hole), {"type": "Feature", "geometry": far}]}
    (tmp_path / "a.geojson").write_text(json.dumps(collection))
    config = SlideConfig(mpp=2.0, mask_dir=tmp_path)
    slide = closed(open_working_slide(pyramid, config))
    drawn = 192 * 192 - 64 * 64 + 32 * 32
    assert slide.tissue_fraction == pytest.approx(drawn / (640 * 512), rel=0.01)
    assert slide.l0_box == Box.from_edges(64, 32, 432, 432)
    before = slide_key(pyramid, config)
    (tmp_path / "a.geojson").write_text(json.dumps(geojson(outer)))
    assert slide_key(pyramid, config) != before


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "the mask cannot be read"),
        ('{"features": []}', "the mask is not GeoJSON"),
        ('{"type": "FeatureCollection", "features": []}', "the mask holds no polygon"),
        (json.dumps(geojson([(9000, 9000), (9100, 9000), (9100, 9100)])), "the mask's polygons lie outside the slide"),
    ],
)
def test_bad_masks_name_the_file(tmp_path: Path, pyramid: Path, text: str, what: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(SlideError, match=rf"{what}.*a\.geojson"):
        open_working_slide(pyramid, SlideConfig(mask_dir=tmp_path))


def test_a_missing_mask_is_announced_once(tmp_path: Path, pyramid: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            closed(open_working_slide(pyramid, SlideConfig(mask_dir=tmp_path)))
    (message,) = caplog.messages
    assert message == f"{pyramid}: no mask for it in {tmp_path}; the tissue is found automatically"


@pytest.mark.parametrize(
    ("name", "size", "dark"),
    [
        ("cmu_small_region.svs", Size(555, 741), False),
        ("dicom-wsi.dcm", Size(1000, 2459), False),
        ("fluorescence-dapi.ndpi", Size(452, 554), True),
    ],
)
def test_real_slides(name: str, size: Size, dark: bool) -> None:
    slide = open_working_slide(real_file(f"slides/{name}"), SlideConfig())
    assert slide.whole_size == size
    assert slide.background_rgb == ((0, 0, 0) if dark else (255, 255, 255))
    whole = slide.read(Box.covering(slide.size))
    box = Box(slide.size.width // 3, slide.size.height // 3, 101, 57)
    np.testing.assert_array_equal(slide.read(box), whole[box.rows_columns])
    slide.close()


@pytest.mark.parametrize("name", ["unopenable.tiff", "unreadable.svs"])
def test_unreadable_slides_fail_when_they_are_opened(name: str) -> None:
    with pytest.raises(SlideError, match=rf"cannot be read.*{name}.*copy the file again"):
        open_working_slide(real_file(f"slides/openslide-fixtures/{name}"), SlideConfig())
