"""Plain images: PNG, JPEG and what else Pillow decodes. They are decoded whole, at the first read."""

from __future__ import annotations

import logging
import struct
import warnings
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, UnidentifiedImageError

from wholeslide.geometry import Box, Size
from wholeslide.slides.notices import say_once
from wholeslide.slides.openslide_reader import composite
from wholeslide.slides.readers import (
    CONVERT_REMEDY,
    DAMAGED_REMEDY,
    DECODED_AT_ONCE,
    WHOLE_DECODE_WARNING_PX,
    Level,
    Pixels,
    Rgb,
    SlideReader,
    slide_error,
    unreadable,
)

logger = logging.getLogger(__name__)

WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class ImageReader(SlideReader):
    """A plain image: one level, no scale."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._open() as image:
            size, mode = Size(*image.size), image.mode
            self.icc_profile = image.info.get("icc_profile")
            self.vendor = (image.format or "image").lower()
        if mode in WIDE_MODES:
            raise slide_error(f"pixels of mode {mode}, not 8 bits", path, "convert the image to 8-bit RGB")
        self.levels = (Level(size, 1.0, 1.0),)
        self.l0_mpp = None
        self.l0_bounds = Box.covering(size)
        self.is_plain_image = True
        self._pixels: dict[Rgb, Pixels] = {}
        self._lock = Lock()

    def _release(self) -> None:
        self._pixels.clear()

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        with self._lock:
            if background_rgb not in self._pixels:
                self._pixels = {background_rgb: self._decode(background_rgb)}
            return self._pixels[background_rgb][level_box.rows_columns].copy()

    def _open(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(self.path)
        except UnidentifiedImageError as error:
            remedy = "give a slide of an OpenSlide format, a DICOM slide, a TIFF, PNG or JPEG, or copy the file again"
            raise slide_error("not an image that any reader knows", self.path, remedy) from error
        except Image.DecompressionBombError as error:
            raise slide_error("too large to be decoded whole", self.path, CONVERT_REMEDY) from error
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:  # what Pillow's plugins let through
            raise unreadable(self.path, error) from error

    def _decode(self, background_rgb: Rgb) -> Pixels:
        if self.l0_size.area > WHOLE_DECODE_WARNING_PX:
            say_once(logger, logging.WARNING, self.path, DECODED_AT_ONCE, self.l0_size)
        try:
            with self._open() as image:
                if image.has_transparency_data:
                    self.met_transparency = True
                    return composite(image.convert("RGBA"), background_rgb)
                return np.asarray(image.convert("RGB"))
        except MemoryError as error:
            raise slide_error("not enough memory to decode it whole", self.path, CONVERT_REMEDY) from error
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
            raise slide_error(f"cannot be read: {error}", self.path, DAMAGED_REMEDY) from error
