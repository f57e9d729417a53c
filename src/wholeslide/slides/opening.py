"""Chooses the reader of a slide."""

from __future__ import annotations

import logging
from pathlib import Path

from wholeslide.errors import SlideError
from wholeslide.geometry import Box
from wholeslide.slides.colour import ToSrgb
from wholeslide.slides.config import Decoders
from wholeslide.slides.fast_reader import FastReader
from wholeslide.slides.image_reader import ImageReader
from wholeslide.slides.isolated_reader import IsolatedReader
from wholeslide.slides.notices import say_once
from wholeslide.slides.openslide_reader import OpenSlideReader, detect_vendor, find_dicom_file
from wholeslide.slides.readers import DAMAGED_REMEDY, SlideReader, slide_error
from wholeslide.slides.tiff_reader import TiffReader, compressions, is_tiff, prefers_tifffile
from wholeslide.slides.tile_layouts import find_stored_tiles
from wholeslide.slides.workers import decoding_processes

logger = logging.getLogger(__name__)

#: How files of PNG, JPEG and BMP begin.
_EVERYDAY_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"BM")
#: Of TIFF: none, LZW, JPEG, deflate (two numbers), and JPEG 2000 (Aperio's and the usual one).
_EVERYDAY_COMPRESSIONS = frozenset((1, 5, 7, 8, 32946, 33003, 33005, 34712))


def open_slide(path: Path, *, fast: bool = True, icc: bool = False, decoders: Decoders = "auto") -> SlideReader:
    """Open a slide or image with the reader that suits it.

    Args:
        path: a file of any of OpenSlide's formats, an OME-TIFF or plain TIFF, a PNG, JPEG or other image, or the folder
            of a DICOM slide.
        fast: decode JPEG and JPEG 2000 tiles directly, where the layout is understood.
        icc: turn colours into sRGB, where the file says what its colours mean.
        decoders: where files are decoded: in ``threads`` of this process, or in ``processes`` of their own, which a
            decoder may crash; ``auto`` takes processes for formats that are none of a scanner's and no everyday image's.

    Raises:
        SlideError: there is no such file, or none of the readers can open it.
    """
    if not path.exists():
        raise slide_error("no such file", path, "check the path")
    if decoders == "processes" or (decoders == "auto" and not _is_everyday(path)):
        reader: SlideReader = IsolatedReader(path, decoding_processes(), fast=fast)
    else:
        reader = open_here(path, fast=fast)
    if icc:
        _correct_colours(reader)
    return reader


def open_here(path: Path, *, fast: bool = True) -> SlideReader:
    """:func:`open_slide` in this process, and with colours as they are stored."""
    plain, file = _open_plainly(path)
    if not fast or isinstance(plain, ImageReader):
        return plain
    try:
        found = find_stored_tiles(file)
    except BaseException:
        plain.close()
        raise
    return FastReader(plain, found) if found else plain


def _open_plainly(path: Path) -> tuple[SlideReader, Path]:
    """The reader, and the file that it reads; of a DICOM slide one of its files."""
    file = find_dicom_file(path) if path.is_dir() else path
    if file.stat().st_size == 0:
        raise slide_error("the file is empty", path, DAMAGED_REMEDY)
    vendor = detect_vendor(file)
    if is_tiff(file) and (vendor is None or (vendor == "generic-tiff" and prefers_tifffile(file))):
        return TiffReader(file), file
    if vendor == "generic-tiff":
        try:
            return OpenSlideReader(file, path), file
        except SlideError as error:
            return _with_more_compressions(file, error), file
    if vendor is not None:
        return OpenSlideReader(file, path), file
    return ImageReader(file), file


def _with_more_compressions(file: Path, error: SlideError) -> SlideReader:
    """A TIFF that OpenSlide takes for its own and cannot read, through tifffile, if that can.

    Raises:
        SlideError: ``error``, if not.
    """
    try:
        reader = TiffReader(file)
    except SlideError:
        raise error from None
    try:
        reader.read_level(0, Box(0, 0, 1, 1))
    except SlideError:
        reader.close()
        raise error from None
    return reader


def _is_everyday(path: Path) -> bool:
    """Whether what decodes the file is used by all the world: OpenSlide, or the usual compressions of TIFF, PNG and JPEG."""
    if path.is_dir():
        return True
    with path.open("rb") as file:
        start = file.read(4)
    if not start or start.startswith(_EVERYDAY_IMAGES):
        return True
    if is_tiff(path):
        # OpenSlide takes any tiled TIFF for a slide of no vendor, whatever it is compressed by.
        return compressions(path) <= _EVERYDAY_COMPRESSIONS or detect_vendor(path) not in (None, "generic-tiff")
    return detect_vendor(path) is not None


def _correct_colours(reader: SlideReader) -> None:
    if reader.icc_profile is None:
        say_once(logger, logging.WARNING, reader.path, "no ICC profile in it; its colours are taken as they are stored")
        return
    try:
        reader.correct_colours(ToSrgb(reader.icc_profile))
    except ValueError as error:
        reader.close()
        remedy = "leave --icc out to take its colours as they are stored, or leave the slide out"
        raise slide_error(f"its ICC profile cannot be used: {error}", reader.path, remedy) from error
