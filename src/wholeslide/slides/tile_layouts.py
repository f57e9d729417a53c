"""Finds the compressed tiles of a slide's levels in TIFF and DICOM files.

What is found is a claim only: :class:`~wholeslide.slides.fast_reader.FastReader` compares pixels before it relies on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import tifffile
from pydicom.encaps import parse_basic_offsets, parse_fragments
from pydicom.errors import InvalidDicomError
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGBaseline8Bit

from wholeslide.geometry import Size
from wholeslide.slides.codecs import Codec, Jpeg, Jpeg2000
from wholeslide.slides.stored_tiles import StoredTiles
from wholeslide.slides.tiff_reader import DECODING_ERRORS, is_tiff

logger = logging.getLogger(__name__)

_JPEG = (7,)
_APERIO_YCBCR, _JPEG2000 = 33003, (33003, 33004, 33005, 34712)
#: Behind a data element's tag and kind: two bytes of nothing and four of length.
_PIXEL_DATA_HEADER_BYTES = 12
#: All that is looked at: a slide's headers can hold the place of every tile.
_DICOM_TAGS = [
    "SeriesInstanceUID",
    "DimensionOrganizationType",
    "ImageType",
    "TotalPixelMatrixFocalPlanes",
    "NumberOfOpticalPaths",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "TotalPixelMatrixColumns",
    "TotalPixelMatrixRows",
    "Columns",
    "Rows",
]


def find_stored_tiles(file: Path) -> list[StoredTiles]:
    """What is stored as JPEG or JPEG 2000 tiles in a TIFF file, or in a DICOM file and those of its series beside it.

    Where the layout is not understood, nothing is found.
    """
    try:
        if is_tiff(file):
            return list(_tiff_tiles(file))
        return list(_dicom_tiles(file))
    except DECODING_ERRORS as error:
        logger.debug("%s: its tiles are not read directly: %s", file, error)
        return []


def _tiff_tiles(file: Path) -> Iterator[StoredTiles]:
    with tifffile.TiffFile(file) as tiff:
        for page in _pages(tiff):
            codec = _tiff_codec(page)
            if codec is None:
                continue
            # tifffile takes the pieces between an NDPI's restart markers as tiles
            tile = Size(page.tilewidth, page.tilelength)
            size = Size(page.imagewidth, page.imagelength)
            yield StoredTiles(file, size, tile, codec, _numbers(page.dataoffsets), _numbers(page.databytecounts))


def _pages(tiff: tifffile.TiffFile) -> Iterator[Any]:
    for page in tiff.pages:
        page = page.aspage()
        yield page
        for sub in page.pages or ():
            yield sub.aspage()


def _tiff_codec(page: Any) -> Codec | None:
    """Of pages of 8-bit RGB tiles; else nothing."""
    is_tiled = page.is_tiled or page.jpegheader is not None
    if not is_tiled or page.planarconfig != 1 or page.samplesperpixel not in (1, 3) or page.bitspersample != 8:
        return None
    if page.compression in _JPEG:
        header = page.jpegheader
        rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
        return Jpeg(header or page.jpegtables, is_header=header is not None, components_are_rgb=rgb)
    if page.compression in _JPEG2000:
        return Jpeg2000(components_are_ycbcr=page.compression == _APERIO_YCBCR)
    return None


def _dicom_tiles(file: Path) -> Iterator[StoredTiles]:
    """Of each volume image of the series that the file belongs to."""
    series = _dicom_header(file)
    if series is None:
        return
    for sibling in sorted(path for path in file.parent.iterdir() if path.is_file()):
        header = series if sibling == file else _dicom_header(sibling)
        if header is None or header.get("SeriesInstanceUID") != series.get("SeriesInstanceUID"):
            continue
        codec = _dicom_codec(header)
        if codec is None:
            continue
        offsets, lengths = _frames(sibling, int(header.NumberOfFrames))
        size = Size(int(header.TotalPixelMatrixColumns), int(header.TotalPixelMatrixRows))
        yield StoredTiles(sibling, size, Size(int(header.Columns), int(header.Rows)), codec, offsets, lengths)


def _dicom_header(file: Path) -> pydicom.Dataset | None:
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_DICOM_TAGS)
    except (InvalidDicomError, *DECODING_ERRORS):
        return None


def _dicom_codec(header: pydicom.Dataset) -> Codec | None:
    """Of images whose frames are the tiles of one plane, row by row; else nothing."""
    if header.get("DimensionOrganizationType") != "TILED_FULL" or "VOLUME" not in header.get("ImageType", ()):
        return None
    if int(header.get("TotalPixelMatrixFocalPlanes") or 1) != 1 or int(header.get("NumberOfOpticalPaths") or 1) != 1:
        return None
    if header.BitsAllocated != 8 or header.SamplesPerPixel not in (1, 3):
        return None
    syntax = header.file_meta.TransferSyntaxUID
    if syntax == JPEGBaseline8Bit:
        return Jpeg(components_are_rgb=header.PhotometricInterpretation == "RGB")
    return Jpeg2000() if syntax in (JPEG2000, JPEG2000Lossless) else None


def _frames(file: Path, count: int) -> tuple[Any, Any]:
    """Offset and length of each frame; frames of several fragments are not understood.

    Raises:
        ValueError: the frames are stored in another way.
    """
    with file.open("rb") as stream:
        pydicom.dcmread(stream, stop_before_pixels=True)
        stream.seek(_PIXEL_DATA_HEADER_BYTES, 1)
        parse_basic_offsets(stream)
        _, item_offsets = parse_fragments(stream)
        if len(item_offsets) != count:
            raise ValueError(f"{len(item_offsets)} fragments for {count} frames")
        lengths = []
        for offset in item_offsets:
            stream.seek(offset + 4)
            lengths.append(int.from_bytes(stream.read(4), "little"))
    return _numbers(item_offsets) + 8, _numbers(lengths)


def _numbers(values: Any) -> Any:
    return np.asarray(values, dtype=np.int64)
