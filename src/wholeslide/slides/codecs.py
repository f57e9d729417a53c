"""Stored tiles decoded straight at a fraction of their size.

A JPEG holds blocks of 8 x 8 pixels as cosine coefficients; the inverse transform of the lowest of them gives a block of half,
a quarter or an eighth of the side, which is nearly the mean of the pixels and takes a fraction of the time. A JPEG 2000 holds
wavelet levels, of which the finest can be left out; that is further from the mean, so that two levels are kept and averaged.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from simplejpeg import decode_jpeg  # type: ignore[attr-defined]

from wholeslide.geometry import Size
from wholeslide.slides.readers import Pixels

#: What a decoder raises for damaged data.
DECODING_ERRORS = (ValueError, OSError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)

_START, _END = b"\xff\xd8", b"\xff\xd9"
#: Tells a decoder that three components are red, green and blue, and not luminance and two chrominances.
_COMPONENTS_ARE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


class Codec(ABC):
    """How the tiles of a level are stored.

    Attributes:
        least_ratio: reduced pixels that have to lie along a working pixel for it to be close to the mean of stored ones.
        block_px: a reduced pixel may depend on all stored pixels of its block.
    """

    least_ratio: ClassVar[int]
    block_px: ClassVar[int]

    @abstractmethod
    def decode(self, data: bytes, size: Size, reduction: int) -> Pixels:
        """A stored tile of ``size`` pixels at 1/``reduction`` of its sides: uint8 of shape (height, width, 3).

        Raises:
            ValueError: the data are damaged, or not of this size; see also :data:`DECODING_ERRORS`.
        """


@dataclass(frozen=True)
class Jpeg(Codec):
    """Baseline JPEG.

    Attributes:
        tables: what comes before each tile's own data: a whole header, which replaces the tile's start, or an abbreviated
            stream of tables only.
        is_header: whether ``tables`` is a header, behind which the tile's data are bare.
        components_are_rgb: whether red, green and blue were compressed as they are.
    """

    tables: bytes | None = None
    is_header: bool = False
    components_are_rgb: bool = False

    least_ratio = 1
    block_px = 16

    def decode(self, data: bytes, size: Size, reduction: int) -> Pixels:
        pixels: Pixels = decode_jpeg(
            self._stream(data),
            "RGB",
            fastdct=reduction > 1,  # what it loses, averages lose too
            min_height=size.height // reduction,
            min_width=size.width // reduction,
        )
        return _checked(pixels, size, reduction)

    def _stream(self, data: bytes) -> bytes:
        """The tile as a JPEG file."""
        if self.is_header:
            assert self.tables is not None
            return self.tables + _without_restart(data) + _END
        if not data.startswith(_START):
            raise ValueError("a tile that is no JPEG")
        marker = _COMPONENTS_ARE_RGB if self.components_are_rgb else b""
        tables = b"" if self.tables is None else self.tables.removeprefix(_START).removesuffix(_END)
        return _START + marker + tables + data[len(_START) :]


@dataclass(frozen=True)
class Jpeg2000(Codec):
    """JPEG 2000, as a file or a bare codestream.

    Attributes:
        components_are_ycbcr: whether the file format says so where the codestream does not.
    """

    components_are_ycbcr: bool = False

    least_ratio = 4
    block_px = 1

    def decode(self, data: bytes, size: Size, reduction: int) -> Pixels:
        with Image.open(io.BytesIO(data), formats=["JPEG2000"]) as file:
            file.reduce = reduction.bit_length() - 1  # type: ignore[method-assign, assignment]  # what the plugin reads
            file.load()
            ycbcr = self.components_are_ycbcr and file.mode == "RGB"
            image = Image.frombytes("YCbCr", file.size, file.tobytes()) if ycbcr else file
            return _checked(np.asarray(image.convert("RGB")), size, reduction)


def _checked(pixels: Pixels, size: Size, reduction: int) -> Pixels:
    height, width = (-(-length // reduction) for length in (size.height, size.width))
    if pixels.shape != (height, width, 3):
        raise ValueError(f"a tile of {pixels.shape[1]}x{pixels.shape[0]} pixels, not {width}x{height}")
    return pixels


def _without_restart(data: bytes) -> bytes:
    """Without the restart marker that ends a piece of a longer stream."""
    return data[:-2] if len(data) > 1 and data[-2] == 0xFF and 0xD0 <= data[-1] <= 0xD7 else data
