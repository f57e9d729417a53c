"""OpenSlide's vendor formats and DICOM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import openslide
from PIL import Image

from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.readers import Level, Pixels, Rgb, SlideReader, slide_error, unreadable, usable_mpp

CHUNK_PX = 2048
BLOCK_PX = 1024
BLOCK_CACHE_BYTES = 48 * 2**20
FRACTIONAL_VENDORS = ("mirax",)


def detect_vendor(file: Path) -> str | None:
    """OpenSlide's name of the file's format; ``None`` where it knows none."""
    vendor: str | None = openslide.OpenSlide.detect_format(str(file))
    return vendor


def find_dicom_file(folder: Path) -> Path:
    """A file of the one DICOM slide in a folder; OpenSlide finds its other levels itself.

    Raises:
        SlideError: no DICOM slide, or more than one, lies in the folder.
    """
    series: dict[str, Path] = {}
    for file in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        if detect_vendor(file) != "dicom":
            continue
        try:
            with openslide.OpenSlide(str(file)) as slide:
                series.setdefault(slide.properties.get("dicom.SeriesInstanceUID", str(file)), file)
        except openslide.OpenSlideError:
            continue  # a label or overview, or a level that cannot stand alone
    if not series:
        raise slide_error(
            "the folder holds no DICOM slide", folder, "name a slide file, or a folder of one DICOM slide"
        )
    if len(series) > 1:
        names = ", ".join(file.name for file in series.values())
        raise slide_error(f"the folder holds {len(series)} DICOM slides", folder, f"name one of their files: {names}")
    return next(iter(series.values()))


class OpenSlideReader(SlideReader):
    """A slide that OpenSlide opens."""

    def __init__(self, file: Path, path: Path | None = None) -> None:
        super().__init__(path or file)
        try:
            self._slide = openslide.OpenSlide(str(file))
        except openslide.OpenSlideError as error:
            raise unreadable(self.path, error) from error
        properties = self._slide.properties
        self.vendor = properties[openslide.PROPERTY_NAME_VENDOR]
        self.description = properties.get(openslide.PROPERTY_NAME_COMMENT, "")
        l0_size = Size(*self._slide.dimensions)
        self.levels = tuple(
            Level.of(Size(*size), l0_size, downsample)
            for size, downsample in zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
        )
        self._downsamples = tuple(self._slide.level_downsamples)  # after a failed read OpenSlide tells nothing more
        profile = self._slide.color_profile
        self.icc_profile = profile.tobytes() if profile is not None else None
        self.l0_mpp = _read_mpp(properties)
        self.l0_bounds = _read_bounds(properties, l0_size)
        self.is_plain_image = self.vendor == "generic-tiff" and len(self.levels) == 1
        self._blocks: OrderedDict[tuple[int, int, int, Rgb], Pixels] = OrderedDict()
        self._blocks_lock = Lock()

    def _release(self) -> None:
        self._slide.close()
        self._blocks.clear()

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        read = self._read_direct if self._is_exact(level) else self._read_blocks
        return read(level, level_box, background_rgb)

    def _is_exact(self, level: int) -> bool:
        """Whether any box of the level starts at a whole level-0 pixel, so that nothing is interpolated."""
        downsample = self._downsamples[level]
        return bool(downsample == int(downsample)) and self.vendor not in FRACTIONAL_VENDORS

    def _read_direct(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        downsample = int(self._downsamples[level])
        if max(level_box.width, level_box.height) <= CHUNK_PX:
            l0_start = (level_box.left * downsample, level_box.top * downsample)
            return self._read_region(l0_start, level, level_box.size, background_rgb)
        out = np.empty((level_box.height, level_box.width, 3), np.uint8)
        for top in range(level_box.top, level_box.bottom, CHUNK_PX):
            for left in range(level_box.left, level_box.right, CHUNK_PX):
                part = Box(left, top, CHUNK_PX, CHUNK_PX).intersection(level_box)
                l0_start = (part.left * downsample, part.top * downsample)
                out[part.relative_to(level_box).rows_columns] = self._read_region(
                    l0_start, level, part.size, background_rgb
                )
        return out

    def _read_blocks(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        """Assemble the box from blocks on a fixed grid.

        Where a level's pixel starts at a fraction of a level-0 pixel, OpenSlide interpolates, and how depends on where
        the region starts. Fixed blocks make a pixel independent of the box that it is read with.
        """
        out = np.empty((level_box.height, level_box.width, 3), np.uint8)
        for row in range(level_box.top // BLOCK_PX, -(-level_box.bottom // BLOCK_PX)):
            for column in range(level_box.left // BLOCK_PX, -(-level_box.right // BLOCK_PX)):
                block_box = Box(column * BLOCK_PX, row * BLOCK_PX, BLOCK_PX, BLOCK_PX)
                part = block_box.intersection(level_box)
                block = self._block(level, row, column, background_rgb)
                out[part.relative_to(level_box).rows_columns] = block[part.relative_to(block_box).rows_columns]
        return out

    def _block(self, level: int, row: int, column: int, background_rgb: Rgb) -> Pixels:
        key = (level, row, column, background_rgb)
        with self._blocks_lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        downsample = self._downsamples[level]
        l0_start = (round(column * BLOCK_PX * downsample), round(row * BLOCK_PX * downsample))
        block = self._read_region(l0_start, level, Size(BLOCK_PX, BLOCK_PX), background_rgb)
        with self._blocks_lock:
            self._blocks[key] = block
            while len(self._blocks) * block.nbytes > BLOCK_CACHE_BYTES:
                self._blocks.popitem(last=False)
        return block

    def _read_region(self, l0_start: tuple[int, int], level: int, size: Size, background_rgb: Rgb) -> Pixels:
        try:
            region = self._slide.read_region(l0_start, level, (size.width, size.height))
        except openslide.OpenSlideError as error:
            raise unreadable(self.path, error) from error
        if is_opaque(region):
            return np.asarray(region.convert("RGB"))
        self.met_transparency = True
        return composite(region, background_rgb)


def is_opaque(image: Image.Image) -> bool:
    """Whether no pixel of an RGBA image lets anything through."""
    return bool(image.getchannel("A").getextrema()[0] == 255)


def composite(image: Image.Image, background_rgb: Rgb) -> Pixels:
    """An RGBA image over a background: uint8 of shape (height, width, 3)."""
    alpha = image.getchannel("A")
    canvas = Image.new("RGB", image.size, background_rgb)
    canvas.paste(image, mask=alpha)
    return np.asarray(canvas)


def _read_mpp(properties: Mapping[str, str]) -> Mpp | None:
    return usable_mpp(
        _number(properties.get(openslide.PROPERTY_NAME_MPP_X)), _number(properties.get(openslide.PROPERTY_NAME_MPP_Y))
    )


def _read_bounds(properties: Mapping[str, str], l0_size: Size) -> Box:
    names = ("BOUNDS_X", "BOUNDS_Y", "BOUNDS_WIDTH", "BOUNDS_HEIGHT")
    values = [_number(properties.get(getattr(openslide, f"PROPERTY_NAME_{name}"))) for name in names]
    numbers = [int(value) for value in values if value is not None]
    everything = Box.covering(l0_size)
    if len(numbers) != 4 or numbers[2] <= 0 or numbers[3] <= 0:
        return everything
    bounds = Box(*numbers).intersection(everything)
    return everything if bounds.empty else bounds


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return None
