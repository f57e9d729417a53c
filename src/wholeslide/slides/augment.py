"""The random changes of a whole slide, drawn once a view: where it is cropped, how it is turned, its colours.

All of them are local: crops, flips and turns are coordinate maps, and the colour jitter is one affine map of a pixel's
(red, green, blue). So they can be applied to any box of a slide as it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.slides.config import AugmentationConfig

GREY_WEIGHTS = (0.299, 0.587, 0.114)
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a rectangle on a grid: mirrored left to right, then turned by quarter turns.

    Attributes:
        mirrored: whether columns are reversed first.
        turns: quarter turns anticlockwise after that, 0 to 3 (``numpy.rot90``).
    """

    mirrored: bool = False
    turns: int = 0

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Orient an array whose first two axes are rows and columns."""
        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.turns)

    def size(self, source: Size) -> Size:
        """The size of a source of this size after orienting."""
        return Size(source.height, source.width) if self.turns % 2 else source

    def source_box(self, box: Box, source: Size) -> Box:
        """The box of the source that becomes ``box`` of the oriented image.

        ``orientation.apply(source)[box] == orientation.apply(source[source_box])``, for every box: flips and turns
        move whole pixels, so reading and orienting commute.
        """
        left, top, right, bottom = box.left, box.top, box.right, box.bottom
        for turn in range(self.turns, 0, -1):
            # Undo one anticlockwise quarter turn of an image that is `width` wide before it.
            width = self._width_before(turn, source)
            left, top, right, bottom = width - bottom, left, width - top, right
        if self.mirrored:
            left, right = source.width - right, source.width - left
        return Box.from_edges(left, top, right, bottom)

    @staticmethod
    def _width_before(turn: int, source: Size) -> int:
        return source.width if turn % 2 else source.height


@dataclass(frozen=True)
class ColourJitter:
    """An affine map of colours in [0, 1], clipped to that range afterwards.

    Attributes:
        matrix: 3 x 3, row by row: output channel from input channels.
        offset: added to each output channel.
    """

    matrix: tuple[tuple[float, float, float], ...]
    offset: tuple[float, float, float]

    @classmethod
    def compose(
        cls, *, brightness: float, contrast: float, saturation: float, hue: float, mean_grey: float
    ) -> ColourJitter:
        """Brightness, then contrast, then saturation, then hue.

        Args:
            brightness: factor of every channel.
            contrast: factor of the distance from ``mean_grey``, a constant of the training tissue (not of the view: it
                would have to be read whole).
            saturation: factor of the distance from the pixel's own grey.
            hue: turn of the chrominance plane of YIQ, as a part of the full circle.
            mean_grey: in [0, 1].
        """
        grey = np.tile(np.asarray(GREY_WEIGHTS), (3, 1))
        saturate = saturation * np.eye(3) + (1 - saturation) * grey
        cosine, sine = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
        turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        colours = np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ @ saturate
        matrix = colours * (contrast * brightness)
        offset = colours @ np.full(3, (1 - contrast) * mean_grey)
        rows = tuple((float(row[0]), float(row[1]), float(row[2])) for row in matrix)
        return cls(rows, (float(offset[0]), float(offset[1]), float(offset[2])))

    def apply(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Jittered colours in [0, 1] of uint8 pixels; both of shape (height, width, 3).

        Elementwise in a fixed order: a pixel does not depend on its neighbours in the array.
        """
        out = np.empty(pixels.shape, np.float32)
        planes = [np.multiply(pixels[..., channel], np.float32(1 / 255), dtype=np.float32) for channel in range(3)]
        for channel in range(3):
            total = planes[0] * np.float32(self.matrix[channel][0])
            total += planes[1] * np.float32(self.matrix[channel][1])
            total += planes[2] * np.float32(self.matrix[channel][2])
            total += np.float32(self.offset[channel])
            np.clip(total, 0.0, 1.0, out=out[..., channel])
        return out


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for one view."""

    crop_box: Box
    orientation: Orientation
    jitter: ColourJitter | None

    @classmethod
    def none(cls, size: Size) -> Augmentation:
        """The slide as it is."""
        return cls(Box.covering(size), Orientation(), None)


def draw_augmentation(
    size: Size, config: AugmentationConfig, rng: np.random.Generator, mean_grey: float
) -> Augmentation:
    """Draw a view of a slide of ``size`` working pixels. The number of draws does not depend on their outcome."""
    draws = rng.random(12)
    crops = draws[0] < config.crop_probability
    left, width = _draw_side(size.width, config, draws[1], draws[2]) if crops else (0, size.width)
    top, height = _draw_side(size.height, config, draws[3], draws[4]) if crops else (0, size.height)
    mirrored = config.flips and draws[5] < 0.5
    upside_down = config.flips and draws[6] < 0.5
    turns = int(draws[7] * 4) if config.turns else 0
    if upside_down:  # top to bottom is left to right and half a turn
        mirrored, turns = not mirrored, (turns + 2) % 4
    jitter = None
    if config.jitter > 0:
        brightness, contrast, saturation = (1 + config.jitter * (2 * draw - 1) for draw in draws[8:11])
        jitter = ColourJitter.compose(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=config.jitter * (2 * draws[11] - 1),
            mean_grey=mean_grey,
        )
    return Augmentation(Box(left, top, width, height), Orientation(bool(mirrored), turns), jitter)


def _draw_side(length: int, config: AugmentationConfig, part_draw: float, start_draw: float) -> tuple[int, int]:
    """Start and length of a crop of one side."""
    minimum = config.crop_minimum_small if length < config.small_side_px else config.crop_minimum
    kept = max(1, round(length * (minimum + (1 - minimum) * part_draw)))
    return int(start_draw * (length - kept + 1)), kept
