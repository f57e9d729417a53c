"""One open slide file: its levels, its scale, and the pixels of any box of any level.

:func:`~wholeslide.slides.opening.open_slide` chooses the reader. Everything that can go wrong with a file becomes a
:class:`~wholeslide.errors.SlideError` that names the file and the remedy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

import numpy as np
import numpy.typing as npt

from wholeslide.errors import Problem, SlideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import is_usable_mpp

Pixels = npt.NDArray[np.uint8]
Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)
BLACK: Rgb = (0, 0, 0)

WHOLE_DECODE_WARNING_PX = 100_000_000
DAMAGED_REMEDY = "copy the file again from its source, or leave it out"
CONVERT_REMEDY = "convert it to a tiled pyramidal TIFF, for example: vips tiffsave IN OUT.tif --tile --pyramid"

DECODED_AT_ONCE = f"%s pixels are decoded at once; {CONVERT_REMEDY}"


@dataclass(frozen=True)
class Level:
    """One resolution of a file: its size, and how many level-0 pixels one of its pixels spans along x and y."""

    size: Size
    downsample_x: float
    downsample_y: float

    @classmethod
    def of(cls, size: Size, l0_size: Size, downsample: float | None = None) -> Level:
        """Derive the downsample from the sizes.

        A level of 75 x 62 pixels of an image of 300 x 250 is a quarter whose last half pixel was dropped; the ratio of
        the sizes (4.016) would stretch it. So a whole number is taken where both sizes are it, rounded up or down.
        """
        whole = max(1, round(downsample if downsample is not None else l0_size.width / max(1, size.width)))
        fits = all(
            abs(l0 / whole - side) <= 1 for l0, side in ((l0_size.width, size.width), (l0_size.height, size.height))
        )
        if fits or (downsample is not None and abs(downsample / whole - 1) < 1e-4):
            return cls(size, float(whole), float(whole))
        return cls(size, l0_size.width / size.width, l0_size.height / size.height)

    @property
    def downsample(self) -> float:
        return (self.downsample_x + self.downsample_y) / 2


class ReaderClosedError(RuntimeError):
    """A read of a slide that another thread has closed."""


class SlideReader(ABC):
    """One open file. Reads are thread-safe until :meth:`close`.

    Attributes:
        path: the file, or the folder of a DICOM slide.
        vendor: OpenSlide's name of the format, ``ome-tiff``, ``generic-tiff``, or a plain image's format (``png``).
        levels: finest first; ``levels[0]`` is level 0.
        l0_mpp: microns per level-0 pixel; ``None`` where the file has no scale that a scanner can have.
        l0_bounds: the part of level 0 that was scanned (``openslide.bounds-*``), or all of it.
        description: the file's own text about itself; may be empty.
        icc_profile: what the file's colours mean; ``None`` where it does not say.
        met_transparency: whether any read so far met a pixel that the file leaves (partly) transparent.
        is_plain_image: whether this is an image rather than a slide: PNG, JPEG, non-pyramidal TIFF.
    """

    path: Path
    vendor: str
    levels: tuple[Level, ...]
    l0_mpp: Mpp | None
    l0_bounds: Box
    is_plain_image: bool
    description: str = ""
    icc_profile: bytes | None = None
    met_transparency: bool = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reads = 0
        self._closed = False
        self._idle = Condition()
        self._colours: Callable[[Pixels], Pixels] | None = None

    @property
    def l0_size(self) -> Size:
        return self.levels[0].size

    def correct_colours(self, colours: Callable[[Pixels], Pixels]) -> None:
        """Pass all pixels that are read from here on through a function of each alone."""
        self._colours = colours

    def reduction_for(self, level: int, ratio_x: float, ratio_y: float) -> int:
        """By how much a level may be reduced while it is decoded, for pixels that span ``ratio_*`` of its own: 1, 2, 4 or 8."""
        del level, ratio_x, ratio_y
        return 1

    def read_level(self, level: int, level_box: Box, background_rgb: Rgb = WHITE, *, reduction: int = 1) -> Pixels:
        """Pixels of a box of a level.

        Args:
            level: index into :attr:`levels`.
            level_box: in pixels of that level, or in reduced ones; may reach over the image.
            background_rgb: what shows through transparent pixels, and what lies outside the image.
            reduction: how many pixels of the level, along x and y, become one: 1, or what :meth:`reduction_for` gave.

        Returns:
            uint8 of shape (height, width, 3).

        Raises:
            SlideError: the file cannot be decoded there.
            ReaderClosedError: the reader was closed before.
        """
        with self._reading():
            return self._read_box(level, level_box, background_rgb, reduction)

    def close(self) -> None:
        """Release the file when the reads that are under way have ended. May be called twice."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._reads == 0)
        self._release()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep the file open for the time of a read: closing it under a decoder would crash the process."""
        with self._idle:
            if self._closed:
                raise ReaderClosedError(f"{self.path} was closed before it was read")
            self._reads += 1
        try:
            yield
        finally:
            with self._idle:
                self._reads -= 1
                self._idle.notify_all()

    def _read_box(self, level: int, level_box: Box, background_rgb: Rgb, reduction: int) -> Pixels:
        size = self.levels[level].size
        inside = level_box.intersection(Box(0, 0, -(-size.width // reduction), -(-size.height // reduction)))
        if inside.empty:
            pixels = np.empty((0, 0, 3), np.uint8)
        elif reduction == 1:
            pixels = self._read_inside(level, inside, background_rgb)
        else:
            pixels = self._read_reduced(level, reduction, inside)
        if self._colours is not None and not inside.empty:
            pixels = self._colours(pixels)
        if inside == level_box and not inside.empty:
            return pixels
        out = np.empty((level_box.height, level_box.width, 3), np.uint8)
        out[:] = background_rgb
        if not inside.empty:
            out[inside.relative_to(level_box).rows_columns] = pixels
        return out

    @abstractmethod
    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        """:meth:`read_level` for a box that is not empty and lies in the image."""

    def _read_reduced(self, level: int, reduction: int, reduced_box: Box) -> Pixels:
        """The same in pixels that are reduced as :meth:`reduction_for` said; what it never says is never asked for."""
        raise AssertionError((self.path, level, reduction, reduced_box))

    @abstractmethod
    def _release(self) -> None:
        """Close the file; called once, when no read is under way."""


def usable_mpp(x: float | None, y: float | None) -> Mpp | None:
    """The scale where both axes have one that a scanner can have; placeholders such as 72 dpi count as missing."""
    if x is None or y is None or not (is_usable_mpp(x) and is_usable_mpp(y)):
        return None
    return Mpp(x, y)


def slide_error(what: str, path: Path, remedy: str) -> SlideError:
    """A problem of one slide."""
    return SlideError([Problem(what, str(path), remedy)])


def unreadable(path: Path, error: object) -> SlideError:
    """The error of a file that opens in no way or fails while it is decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return slide_error(f"cannot be read: {reason}", path, DAMAGED_REMEDY)
