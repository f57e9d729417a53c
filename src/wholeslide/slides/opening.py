"""Chooses the reader of a slide."""

from __future__ import annotations

from pathlib import Path

from wholeslide.errors import SlideError
from wholeslide.slides.fast_reader import FastReader
from wholeslide.slides.image_reader import ImageReader
from wholeslide.slides.openslide_reader import OpenSlideReader, detect_vendor, find_dicom_file
from wholeslide.slides.readers import DAMAGED_REMEDY, SlideReader, slide_error
from wholeslide.slides.tiff_reader import TiffReader, is_tiff, prefers_tifffile
from wholeslide.slides.tile_layouts import find_stored_tiles


def open_slide(path: Path, *, fast: bool = True) -> SlideReader:
    """Open a slide or image with the reader that suits it.

    Args:
        path: a file of any of OpenSlide's formats, an OME-TIFF or plain TIFF, a PNG, JPEG or other image, or the folder
            of a DICOM slide.
        fast: decode JPEG and JPEG 2000 tiles directly, where the layout is understood.

    Raises:
        SlideError: there is no such file, or none of the readers can open it.
    """
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
    if not path.exists():
        raise slide_error("no such file", path, "check the path")
    file = find_dicom_file(path) if path.is_dir() else path
    if file.stat().st_size == 0:
        raise slide_error("the file is empty", path, DAMAGED_REMEDY)
    vendor = detect_vendor(file)
    if is_tiff(file) and (vendor is None or (vendor == "generic-tiff" and prefers_tifffile(file))):
        return TiffReader(file), file
    if vendor == "generic-tiff":
        try:
            return OpenSlideReader(file, path), file
        except SlideError:  # tifffile knows more compressions
            return TiffReader(file), file
    if vendor is not None:
        return OpenSlideReader(file, path), file
    return ImageReader(file), file
