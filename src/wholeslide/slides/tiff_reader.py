"""OME-TIFF and plain TIFF through tifffile: pyramids in SubIFDs, tiles, strips, grey and planar images.

Only the tiles or strips that a box touches are decoded, so memory stays bounded unless the file is one single strip.
"""

from __future__ import annotations

import logging
import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.notices import say_once
from wholeslide.slides.readers import (
    CONVERT_REMEDY,
    DECODED_AT_ONCE,
    WHOLE_DECODE_WARNING_PX,
    Level,
    Pixels,
    Rgb,
    SlideReader,
    slide_error,
    unreadable,
    usable_mpp,
)

logger = logging.getLogger(__name__)

SEGMENT_CACHE_BYTES = 64 * 2**20
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MICRONS_PER_UNIT = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0}
DECODING_ERRORS = (
    *(
        tifffile.TiffFileError,
        struct.error,
        zlib.error,
        ValueError,
        RuntimeError,
        OSError,
        KeyError,
        IndexError,
        TypeError,
    ),
    *(AttributeError, ArithmeticError),
)
#: What a sample means: grey or colour as it is. Indices into a palette, printing inks and negatives are something else.
_PHOTOMETRICS = ("MINISBLACK", "RGB", "YCBCR")


def is_tiff(file: Path) -> bool:
    """Whether the file starts as a TIFF or BigTIFF does."""
    with file.open("rb") as stream:
        return stream.read(4) in TIFF_MAGIC


def compressions(file: Path) -> frozenset[int]:
    """The TIFF numbers of a file's compressions; of one that cannot be told, none that there is."""
    try:
        with tifffile.TiffFile(file) as tiff:
            return frozenset(int(page.aspage().compression) for page in tiff.pages)
    except DECODING_ERRORS:
        return frozenset()


def prefers_tifffile(file: Path) -> bool:
    """Whether a TIFF that OpenSlide takes as generic has something that only tifffile sees: OME metadata or SubIFDs."""
    try:
        with tifffile.TiffFile(file) as tiff:
            first = tiff.pages.first
            return bool(tiff.is_ome) or bool(first.subifds)
    except DECODING_ERRORS:
        return False


class TiffReader(SlideReader):
    """The first image series of a TIFF file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._tiff = tifffile.TiffFile(path)
        except DECODING_ERRORS as error:
            raise unreadable(path, error) from error
        try:
            self._describe()
        except BaseException:
            self._tiff.close()
            raise
        self._segments: OrderedDict[tuple[int, int, int], npt.NDArray[Any]] = OrderedDict()
        self._lock = Lock()

    def _describe(self) -> None:
        """Read levels and scale from the file's tags.

        Raises:
            SlideError: the tags are damaged, or the pixels are not 8-bit grey or RGB.
        """
        try:
            series = self._tiff.series[0]
            self._levels = [_LevelPages.of(level) for level in series.levels]
            first = self._tiff.pages.first
            self.icc_profile = first.tags.valueof("InterColorProfile")
            self.description = first.description if first.description is not None else ""
            self.l0_mpp = _ome_mpp(self._tiff.ome_metadata) if self._tiff.is_ome else _tag_mpp(first)
        except DECODING_ERRORS as error:
            raise unreadable(self.path, error) from error
        problem = self._levels[0].problem()
        if problem:
            raise slide_error(problem, self.path, "export it as 8-bit RGB, for example from QuPath as OME-TIFF (RGB)")
        l0_size = self._levels[0].size
        self.levels = tuple(Level.of(level.size, l0_size) for level in self._levels)
        self.vendor = "ome-tiff" if self._tiff.is_ome else "generic-tiff"
        self.l0_bounds = Box.covering(l0_size)
        self.is_plain_image = self.vendor == "generic-tiff" and len(self.levels) == 1

    def _release(self) -> None:
        self._tiff.close()
        self._segments.clear()

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        pages = self._levels[level]
        out = np.empty((level_box.height, level_box.width, 3), np.uint8)
        out[:] = background_rgb
        for row in range(level_box.top // pages.segment.height, -(-level_box.bottom // pages.segment.height)):
            for column in range(level_box.left // pages.segment.width, -(-level_box.right // pages.segment.width)):
                segment_box = Box(
                    column * pages.segment.width, row * pages.segment.height, pages.segment.width, pages.segment.height
                )
                part = segment_box.intersection(level_box)
                target = out[part.relative_to(level_box).rows_columns]
                inner = part.relative_to(segment_box).rows_columns
                self._paint(target, level, row * pages.across + column, inner, background_rgb)
        return out

    def _paint(self, target: Pixels, level: int, index: int, inner: tuple[slice, slice], background_rgb: Rgb) -> None:
        """Fill ``target`` (h, w, 3) from one segment's ``inner`` part; one that the file lacks leaves it alone."""
        pages = self._levels[level]
        planes = [self._segment(level, plane, index) for plane in range(pages.planes)]
        if any(plane is None for plane in planes):
            self.met_transparency = True
            return
        if pages.planes > 1:
            for channel, plane in enumerate(planes[:3]):
                assert plane is not None
                target[..., channel] = plane[inner][..., 0]
            return
        assert planes[0] is not None
        pixels = planes[0][inner]
        if pages.samples < 3:
            target[:] = pixels[..., :1]
        elif pages.samples == 3:
            target[:] = pixels
        else:
            self.met_transparency = True
            alpha = pixels[..., 3:4].astype(np.uint16)
            blended = pixels[..., :3] * alpha + np.asarray(background_rgb, np.uint16) * (255 - alpha)
            target[:] = (blended + 127) // 255

    def _segment(self, level: int, plane: int, index: int) -> npt.NDArray[Any] | None:
        """One decoded tile or strip: (height, width, samples); ``None`` where the file has no data for it."""
        key = (level, plane, index)
        pages = self._levels[level]
        with self._lock:
            if key in self._segments:
                self._segments.move_to_end(key)
                return self._segments[key]
            page, page_index = pages.locate(plane, index)
            try:
                offset, count = page.dataoffsets[page_index], page.databytecounts[page_index]
                if count == 0:
                    return None
                handle = self._tiff.filehandle
                handle.seek(offset)
                data = handle.read(count)
            except DECODING_ERRORS as error:
                raise unreadable(self.path, error) from error
        if pages.segment.area > WHOLE_DECODE_WARNING_PX:
            say_once(logger, logging.WARNING, self.path, DECODED_AT_ONCE, pages.segment)
        decoded = self._decode(page, data, page_index)
        with self._lock:
            self._segments[key] = decoded
            total = sum(segment.nbytes for segment in self._segments.values())
            while total > SEGMENT_CACHE_BYTES and len(self._segments) > pages.planes:
                total -= self._segments.popitem(last=False)[1].nbytes
        return decoded

    def _decode(self, page: Any, data: bytes, page_index: int) -> npt.NDArray[Any]:
        try:
            decoded, _, shape = page.decode(data, page_index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        except MemoryError as error:
            raise slide_error("not enough memory to decode it whole", self.path, CONVERT_REMEDY) from error
        except DECODING_ERRORS as error:
            raise unreadable(self.path, error) from error
        if decoded is None:
            raise unreadable(self.path, "a tile decodes to nothing")
        pixels: npt.NDArray[Any] = decoded.reshape(decoded.shape[-3:])[: shape[1], : shape[2]]
        return pixels


class _LevelPages:
    """The pages of one level: one page, or one a channel; and how they are cut into tiles or strips ("segments")."""

    def __init__(self, pages: list[Any], axes: str) -> None:
        self.pages = pages
        self.axes = axes
        page = pages[0]
        self.dtype = page.dtype
        self.photometric = getattr(page.photometric, "name", str(page.photometric))
        self.size = Size(page.imagewidth, page.imagelength)
        self.samples: int = page.samplesperpixel if page.planarconfig == 1 else 1
        self.planes = len(pages) if len(pages) > 1 else (1 if page.planarconfig == 1 else page.samplesperpixel)
        if page.is_tiled:
            self.segment = Size(page.tilewidth, page.tilelength)
        else:
            self.segment = Size(page.imagewidth, min(page.rowsperstrip, page.imagelength))
        self.across = math.ceil(self.size.width / self.segment.width)
        self.down = math.ceil(self.size.height / self.segment.height)

    @classmethod
    def of(cls, level: Any) -> _LevelPages:
        return cls([page.aspage() if hasattr(page, "aspage") else page for page in level.pages], level.axes)

    def locate(self, plane: int, index: int) -> tuple[Any, int]:
        """The page that holds a segment of a plane, and the segment's index in that page."""
        if len(self.pages) > 1:
            return self.pages[plane], index
        return self.pages[0], plane * self.across * self.down + index

    def problem(self) -> str | None:
        """What makes these pages something else than an 8-bit grey or RGB image; ``None`` if nothing does."""
        if self.dtype != np.uint8:
            return f"pixels of type {self.dtype}, not 8 bits"
        if self.photometric not in _PHOTOMETRICS:
            return f"pixels of the kind {self.photometric}, not grey or RGB"
        if len(self.pages) > 1 and (self.axes[0] not in "CS" or self.pages[0].samplesperpixel != 1):
            return f"{len(self.pages)} pages (axes {self.axes}), not one image"
        if self.planes not in (1, 3, 4) or self.samples > 4:
            return f"{max(self.planes, self.samples)} channels (axes {self.axes}), not grey or RGB"
        return None


def _ome_mpp(metadata: str | None) -> Mpp | None:
    """PhysicalSizeX and -Y of the first image, in microns whatever their unit."""
    if not metadata:
        return None
    try:
        root = ElementTree.fromstring(metadata)
    except ElementTree.ParseError:
        return None
    pixels = root.find(".//{*}Pixels")
    if pixels is None:
        return None
    return usable_mpp(_physical_size(pixels, "X"), _physical_size(pixels, "Y"))


def _physical_size(pixels: ElementTree.Element, axis: str) -> float | None:
    text = pixels.get(f"PhysicalSize{axis}")
    factor = MICRONS_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
    if text is None or factor is None:
        return None
    try:
        return float(text) * factor
    except ValueError:
        return None


def _tag_mpp(page: Any) -> Mpp | None:
    """Scale from XResolution and YResolution, which need a unit of centimetres or inches."""
    unit = page.tags.valueof("ResolutionUnit", 2)
    microns = {2: 25400.0, 3: 10000.0}.get(int(unit))
    x, y = (_resolution(page, axis) for axis in "XY")
    if microns is None or not x or not y:
        return None
    return usable_mpp(microns / x, microns / y)


def _resolution(page: Any, axis: str) -> float | None:
    value = page.tags.valueof(f"{axis}Resolution")
    if value is None or value[1] == 0:
        return None
    return float(value[0]) / float(value[1])
