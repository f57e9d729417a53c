from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from slides_cases import real_file, texture, write_ome, write_pyramid

from wholeslide.errors import SlideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides import tiff_reader
from wholeslide.slides.image_reader import ImageReader
from wholeslide.slides.opening import open_slide
from wholeslide.slides.openslide_reader import OpenSlideReader
from wholeslide.slides.readers import BLACK, Level, SlideReader


@pytest.fixture(autouse=True)
def close_readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close whatever a test opens, so that an unclosed file is the library's fault."""
    opened: list[SlideReader] = []
    for kind in (tiff_reader.TiffReader, OpenSlideReader, ImageReader):

        def remember(self: SlideReader, *args: Any, original: Any = kind.__init__) -> None:
            original(self, *args)
            opened.append(self)

        monkeypatch.setattr(kind, "__init__", remember)
    yield
    for reader in opened:
        reader.close()


def read_all(path: Path, level: int = 0) -> np.ndarray:
    reader = open_slide(path)
    try:
        return reader.read_level(level, Box.covering(reader.levels[level].size))
    finally:
        reader.close()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"no such file \(.*gone\.svs\): check the path"):
        open_slide(tmp_path / "gone.svs")


def test_empty_file_and_rubbish_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(SlideError, match="the file is empty"):
        open_slide(tmp_path / "empty.svs")
    with pytest.raises(SlideError, match="not an image that any reader knows"):
        open_slide(tmp_path / "text.svs")


@pytest.mark.parametrize("name", ["slide 😐.png", "schnitt-ß.tif"])
def test_unicode_paths(tmp_path: Path, name: str) -> None:
    image = texture(70, 50)
    if name.endswith("png"):
        Image.fromarray(image).save(tmp_path / name)
    else:
        write_pyramid(tmp_path / name, image, levels=1)
    np.testing.assert_array_equal(read_all(tmp_path / name), image)


def test_boxes_that_reach_over_the_image_show_background(tmp_path: Path) -> None:
    image = texture(70, 50)
    reader = open_slide(write_pyramid(tmp_path / "a.tif", image, levels=1))
    pixels = reader.read_level(0, Box(-5, 45, 80, 10), BLACK)
    np.testing.assert_array_equal(pixels[:5, 5:75], image[45:])
    assert not pixels[5:].any()
    assert not pixels[:, :5].any()


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[:20] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    reader = open_slide(tmp_path / "a.png")
    assert (reader.read_level(0, Box(0, 0, 40, 40))[:20] == (10, 20, 30)).all()
    assert (reader.read_level(0, Box(0, 0, 40, 40))[20:] == 255).all()
    assert (reader.read_level(0, Box(0, 0, 40, 40), BLACK)[20:] == 0).all()
    assert reader.met_transparency


def test_ome_pyramid_in_subifds_is_found(tmp_path: Path) -> None:
    image = texture(300, 200)
    path = write_ome(tmp_path / "a.ome.tif", image)
    reader = open_slide(path)
    assert reader.vendor == "ome-tiff"
    assert [level.size for level in reader.levels] == [Size(300, 200), Size(150, 100)]
    assert reader.l0_mpp == Mpp(0.5, 0.5)
    assert not reader.is_plain_image
    np.testing.assert_array_equal(read_all(path), image)
    np.testing.assert_array_equal(read_all(path, 1), image[::2, ::2])
    np.testing.assert_array_equal(reader.read_level(0, Box(60, 61, 130, 70)), image[61:131, 60:190])


@pytest.mark.parametrize(
    ("value", "unit", "expected"), [(500.0, "nm", 0.5), (0.00025, "mm", 0.25), (300.0, "µm", None)]
)
def test_ome_units_are_converted_and_placeholders_count_as_missing(
    tmp_path: Path, value: float, unit: str, expected: float | None
) -> None:
    reader = open_slide(write_ome(tmp_path / "a.ome.tif", texture(64, 64), mpp=value, unit=unit))
    assert (reader.l0_mpp.x if reader.l0_mpp else None) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rowsperstrip": 16},
        {"compression": "deflate", "rowsperstrip": 7},
        {"planarconfig": "separate", "tile": (32, 32)},
        {"compression": "lzw", "tile": (48, 32)},
    ],
)
def test_every_layout_of_a_plain_tiff(tmp_path: Path, options: dict[str, object]) -> None:
    image = texture(90, 61)
    stored = image.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else image
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **options)
    reader = tiff_reader.TiffReader(tmp_path / "a.tif")
    assert reader.is_plain_image
    np.testing.assert_array_equal(reader.read_level(0, Box(0, 0, 90, 61)), image)
    np.testing.assert_array_equal(reader.read_level(0, Box(13, 29, 50, 20)), image[29:49, 13:63])


def test_grey_and_transparent_tiff(tmp_path: Path) -> None:
    grey = texture(40, 40)[..., 0]
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    assert (read_all(tmp_path / "grey.tif") == grey[..., None]).all()
    rgba = np.dstack([texture(40, 40), np.zeros((40, 40), np.uint8)])
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert (tiff_reader.TiffReader(tmp_path / "rgba.tif").read_level(0, Box(0, 0, 40, 40)) == 255).all()


def test_sixteen_bits_and_many_channels_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "deep.tif", texture(40, 40).astype(np.uint16), photometric="rgb")
    with pytest.raises(SlideError, match=r"pixels of type uint16, not 8 bits .*deep\.tif.*: export it as 8-bit RGB"):
        open_slide(tmp_path / "deep.tif")
    tifffile.imwrite(tmp_path / "five.ome.tif", np.zeros((5, 40, 40), np.uint8), metadata={"axes": "CYX"})
    with pytest.raises(SlideError, match="5 channels"):
        open_slide(tmp_path / "five.ome.tif")


def test_pixels_that_are_no_colours_are_refused(tmp_path: Path) -> None:
    """Indices into a palette, printing inks and negatives would be read without an error, and be wrong."""
    colour = Image.fromarray(texture(40, 40))
    colour.quantize(8).save(tmp_path / "palette.tif")
    colour.convert("CMYK").save(tmp_path / "inks.tif")
    tifffile.imwrite(tmp_path / "negative.tif", texture(40, 40)[..., 0], photometric="miniswhite")
    for name, kind in (("palette", "PALETTE"), ("inks", "SEPARATED"), ("negative", "MINISWHITE")):
        with pytest.raises(SlideError, match=rf"pixels of the kind {kind}, not grey or RGB .*{name}\.tif.*: export it"):
            tiff_reader.TiffReader(tmp_path / f"{name}.tif")


@pytest.mark.parametrize("pages", [2, 3, 4])
@pytest.mark.parametrize("colour", [True, False])
def test_a_stack_of_images_is_not_taken_for_channels(tmp_path: Path, pages: int, *, colour: bool) -> None:
    images = [texture(40, 40) if colour else texture(40, 40)[..., 0] for _ in range(pages)]
    first, *others = map(Image.fromarray, images)
    first.save(tmp_path / "stack.tif", save_all=True, append_images=others)
    with pytest.raises(SlideError, match="not one image"):
        tiff_reader.TiffReader(tmp_path / "stack.tif")


def test_what_decoders_let_through_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "short.tif").write_bytes(b"II*\0")
    with pytest.raises(SlideError, match=r"short\.tif"):
        open_slide(tmp_path / "short.tif")
    info = PngInfo()
    info.add_text("comment", "x" * (2 << 20), zip=True)
    Image.fromarray(texture(40, 40)).save(tmp_path / "chatty.png", pnginfo=info)
    with pytest.raises(SlideError, match=r"chatty\.png"):
        open_slide(tmp_path / "chatty.png")


@pytest.mark.parametrize(
    ("unit", "value", "expected"), [("INCH", 72.0, None), ("CENTIMETER", 20000.0, 0.5), ("NONE", 20000.0, None)]
)
def test_resolution_tags(tmp_path: Path, unit: str, value: float, expected: float | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", texture(40, 40), resolution=(value, value), resolutionunit=unit)
    for reader in (open_slide(tmp_path / "a.tif"), tiff_reader.TiffReader(tmp_path / "a.tif")):
        assert (reader.l0_mpp.x if reader.l0_mpp else None) == expected


def test_truncated_files_fail_when_they_are_read(tmp_path: Path) -> None:
    image = texture(400, 300)
    Image.fromarray(image).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20000])
    tifffile.imwrite(tmp_path / "a.tif", image, compression="deflate", rowsperstrip=20)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:100000])
    for name in ("cut.jpg", "cut.tif"):
        with pytest.raises(SlideError, match=rf"cannot be read: .*{name}.*: copy the file again from its source"):
            read_all(tmp_path / name)


def test_decompression_bomb_says_how_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(texture(60, 60)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SlideError, match=r"too large to be decoded whole .*: convert it to a tiled pyramidal TIFF"):
        open_slide(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    assert read_all(tmp_path / "a.png").shape == (60, 60, 3)


def test_a_large_single_strip_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", texture(64, 64), rowsperstrip=64, photometric="rgb")
    monkeypatch.setattr(tiff_reader, "WHOLE_DECODE_WARNING_PX", 1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with contextlib.closing(tiff_reader.TiffReader(tmp_path / "a.tif")) as reader:
                reader.read_level(0, Box(0, 0, 5, 5))
    assert [record.getMessage() for record in caplog.records if "decoded at once" in record.getMessage()] == [
        f"{tmp_path / 'a.tif'}: 64x64 pixels are decoded at once; {tiff_reader.CONVERT_REMEDY}"
    ]


@pytest.mark.parametrize(
    ("size", "downsample", "expected"),
    [(Size(75, 62), 4.016, 4.0), (Size(37, 31), 8.086, 8.0), (Size(100, 83), None, 3.0), (Size(120, 100), None, 2.5)],
)
def test_level_downsample_is_whole_where_the_sizes_allow_it(
    size: Size, downsample: float | None, expected: float
) -> None:
    level = Level.of(size, Size(300, 250), downsample)
    assert (level.downsample_x, level.downsample_y) == (expected, expected)


def test_openslide_level_that_is_no_whole_fraction_does_not_depend_on_the_box(tmp_path: Path) -> None:
    path = real_file("slides/openslide-fixtures/boxes.tiff")
    reader = open_slide(path)
    for level in range(len(reader.levels)):
        whole = reader.read_level(level, Box.covering(reader.levels[level].size))
        for box in (Box(3, 5, 20, 11), Box(1, 2, 30, 25), Box(17, 9, 1, 1)):
            np.testing.assert_array_equal(reader.read_level(level, box), whole[box.rows_columns])


def test_unreadable_fixtures() -> None:
    with pytest.raises(SlideError, match=r"cannot be read: Unsupported TIFF compression.*unopenable\.tiff"):
        open_slide(real_file("slides/openslide-fixtures/unopenable.tiff"))
    reader = open_slide(real_file("slides/openslide-fixtures/unreadable.svs"))
    with pytest.raises(SlideError, match=r"cannot be read: Bogus marker length .*unreadable\.svs"):
        reader.read_level(0, Box(0, 0, 16, 16))


def test_dicom_file_and_folder(tmp_path: Path) -> None:
    path = real_file("slides/dicom-wsi.dcm")
    shutil.copy(path, tmp_path / "a.dcm")
    (tmp_path / "notes.txt").write_text("nothing")
    by_file, by_folder = open_slide(path), open_slide(tmp_path)
    assert by_folder.path == tmp_path
    assert by_file.vendor == by_folder.vendor == "dicom"
    box = Box(400, 1000, 50, 40)
    np.testing.assert_array_equal(by_file.read_level(0, box), by_folder.read_level(0, box))


def test_folders_without_or_with_several_dicom_slides(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="the folder holds no DICOM slide"):
        open_slide(tmp_path)
    shutil.copy(real_file("slides/dicom-wsi.dcm"), tmp_path / "a.dcm")
    shutil.copy(real_file("slides/openslide-fixtures/boxes_0.dcm"), tmp_path / "b.dcm")
    with pytest.raises(
        SlideError, match=r"the folder holds 2 DICOM slides .*: name one of their files: a\.dcm, b\.dcm"
    ):
        open_slide(tmp_path)
