"""One draw of a slide, as the network sees it: the only way in which pixels enter training and prediction."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.slides.augment import Augmentation, draw_augmentation
from wholeslide.slides.config import AugmentationConfig
from wholeslide.slides.notices import say_once
from wholeslide.slides.readers import Pixels, ReaderClosedError
from wholeslide.slides.working import WorkingSlide

logger = logging.getLogger(__name__)

PREFETCH_STRIP_PX = 1024
DEFAULT_MEAN_GREY = 0.5


class SlideView:
    """A slide cropped, flipped, turned, masked and jittered by one draw, and padded for the network.

    Attributes:
        slide: where the pixels come from.
        augmentation: what was drawn.
        size: width and height in pixels of the view, padding included.
    """

    def __init__(self, slide: WorkingSlide, augmentation: Augmentation, size: Size) -> None:
        self.slide = slide
        self.augmentation = augmentation
        self.size = size
        self._content = augmentation.orientation.size(augmentation.crop_box.size)
        self._memory: Pixels | None = None
        self._closed = False

    def read(self, px_box: Box) -> npt.NDArray[np.uint8 | np.float32]:
        """Pixels of a box of the view. Thread-safe; the same pixels whatever the box, in memory or not.

        Args:
            px_box: inside :attr:`size`.

        Returns:
            (height, width, 3), not normalised: uint8 as they are stored, or, where colours were jittered, float32 in [0, 1].

        Raises:
            SlideError: the file cannot be decoded there.
        """
        assert Box.covering(self.size).contains(px_box), (px_box, self.size)
        return self._coloured(self._read_padded(px_box))

    @cached_property
    def background(self) -> npt.NDArray[np.uint8 | np.float32]:
        """The colour of what is masked and of what is padded, as :meth:`read` gives it, (3,)."""
        pixels = self._coloured(np.array([[self.slide.background_rgb]], np.uint8))
        return pixels.reshape(3)

    def is_background(self, px_box: Box) -> bool:
        """Whether a box is known to hold nothing but background, without being read."""
        inside = px_box.intersection(Box.covering(self._content))
        if inside.empty:
            return True
        crop_box = self.augmentation.crop_box
        crop_part = self.augmentation.orientation.source_box(inside, crop_box.size)
        return self.slide.is_background(crop_part.shifted(crop_box.left, crop_box.top))

    def prefetch(self, limit_bytes: int) -> None:
        """Load the whole view into memory as uint8 (3 bytes a pixel) if it fits the limit; else do nothing.

        Meant for a background thread: reads are served from the file until the load is complete, and closing the view
        ends it.

        Raises:
            SlideError: the file cannot be decoded.
        """
        crop_box = self.augmentation.crop_box
        if self._memory is not None or crop_box.size.area * 3 > limit_bytes:
            return
        memory = np.empty((crop_box.height, crop_box.width, 3), np.uint8)
        for top in range(0, crop_box.height, PREFETCH_STRIP_PX):
            if self._closed:
                return
            strip = Box(0, top, crop_box.width, PREFETCH_STRIP_PX).intersection(Box.covering(crop_box.size))
            try:
                memory[strip.rows_columns] = self.slide.read(strip.shifted(crop_box.left, crop_box.top))
            except ReaderClosedError:
                return
        self._memory = memory

    def close(self) -> None:
        """Release the memory and the slide. May be called twice."""
        self._closed = True
        self._memory = None
        self.slide.close()

    def _coloured(self, pixels: Pixels) -> npt.NDArray[np.uint8 | np.float32]:
        return pixels if self.augmentation.jitter is None else self.augmentation.jitter.apply(pixels)

    def _read_padded(self, px_box: Box) -> Pixels:
        inside = px_box.intersection(Box.covering(self._content))
        if inside == px_box:
            return self._read_content(px_box)
        pixels = np.full((px_box.height, px_box.width, 3), self.slide.background_rgb, np.uint8)
        if not inside.empty:
            pixels[inside.relative_to(px_box).rows_columns] = self._read_content(inside)
        return pixels

    def _read_content(self, px_box: Box) -> Pixels:
        crop_box, orientation = self.augmentation.crop_box, self.augmentation.orientation
        crop_part = orientation.source_box(px_box, crop_box.size)
        memory = self._memory
        if memory is not None:
            return orientation.apply(memory[crop_part.rows_columns])
        return orientation.apply(self.slide.read(crop_part.shifted(crop_box.left, crop_box.top)))


def make_view(
    slide: WorkingSlide,
    *,
    augmentation: AugmentationConfig | None = None,
    rng: np.random.Generator | None = None,
    mean_grey: float = DEFAULT_MEAN_GREY,
    padded_size: Callable[[Size], Size] | None = None,
) -> SlideView:
    """One view of a slide; closing it closes the slide.

    Args:
        slide: the slide at the working resolution.
        augmentation: what to change at random; ``None`` for validation and prediction.
        rng: where the draws come from; required with ``augmentation``.
        mean_grey: of the training tissue, in [0, 1]; contrast jitter blends with it.
        padded_size: the size that the network needs for a view of a given size; the columns and rows that are added at
            the right and at the bottom are background.
    """
    if augmentation is None:
        drawn = Augmentation.none(slide.size)
    else:
        assert rng is not None, "augmentation without a generator"
        drawn = draw_augmentation(slide.size, augmentation, rng, mean_grey)
    content = drawn.orientation.size(drawn.crop_box.size)
    size = content if padded_size is None else padded_size(content)
    assert Box.covering(size).contains(Box.covering(content)), (size, content)
    if size != content:
        _announce_padding(slide, content, size)
    return SlideView(slide, drawn, size)


def _announce_padding(slide: WorkingSlide, content: Size, size: Size) -> None:
    """Say that a slide is padded: as a warning where it is much smaller than the network needs."""
    much = max(size.width - content.width, size.height - content.height) >= 32
    say_once(
        logger,
        logging.WARNING if much else logging.DEBUG,
        slide.path,
        "the view of %s pixels is padded with background to %s, the least that the network takes",
        content,
        size,
    )
