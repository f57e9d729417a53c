"""Frozen value types for sizes, boxes and scales.

A coordinate's frame is carried by the name of the variable that holds it: ``l0_`` for level 0 of the file, ``level_``
for one of its levels, ``px_`` for working pixels of a view, ``cell_`` for cells of a feature map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wholeslide.errors import ConfigError


@dataclass(frozen=True, order=True)
class Size:
    """Width and height, in the unit of the frame that the variable's name tells."""

    width: int
    height: int

    def __post_init__(self) -> None:
        assert min(self.width, self.height) >= 0, self

    @classmethod
    def parse(cls, text: str) -> Size:
        """``"701x623"`` is 701 wide and 623 high.

        Raises:
            ConfigError: the text is not WIDTHxHEIGHT with two positive integers.
        """
        match = re.fullmatch(r"\s*([1-9]\d*)\s*[xX×]\s*([1-9]\d*)\s*", text)
        if match is None:
            raise ConfigError.single(
                "not a size", where=repr(text), remedy="write WIDTHxHEIGHT in pixels, for example 8698x7496"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def area(self) -> int:
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Box:
    """A half-open rectangle: columns ``left … right-1``, rows ``top … bottom-1``."""

    left: int
    top: int
    width: int
    height: int

    def __post_init__(self) -> None:
        assert min(self.width, self.height) >= 0, self

    @classmethod
    def from_edges(cls, left: int, top: int, right: int, bottom: int) -> Box:
        return cls(left, top, right - left, bottom - top)

    @classmethod
    def covering(cls, size: Size) -> Box:
        """The whole of a frame of this size."""
        return cls(0, 0, size.width, size.height)

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def empty(self) -> bool:
        return self.width == 0 or self.height == 0

    def intersection(self, other: Box) -> Box:
        """The common part; of zero width or height where there is none."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return Box(left, top, max(0, right - left), max(0, bottom - top))

    def contains(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def shifted(self, dx: int, dy: int) -> Box:
        return Box(self.left + dx, self.top + dy, self.width, self.height)

    def relative_to(self, origin: Box) -> Box:
        """The same box in a frame whose origin is the other box's upper left corner."""
        return self.shifted(-origin.left, -origin.top)

    @property
    def rows_columns(self) -> tuple[slice, slice]:
        """Index of an ``(height, width)`` array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Mpp:
    """Microns per pixel along x and y."""

    x: float
    y: float

    @property
    def mean(self) -> float:
        return (self.x + self.y) / 2
