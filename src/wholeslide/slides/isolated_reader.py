"""A slide that is opened and read in processes of its own."""

from __future__ import annotations

from pathlib import Path

from wholeslide.geometry import Box
from wholeslide.slides.readers import Pixels, Rgb, SlideReader
from wholeslide.slides.slide_file import SlideFile
from wholeslide.slides.workers import Workers


class IsolatedReader(SlideReader):
    """What any of the workers reads; a worker that crashes makes an error of this slide, and nothing else.

    Args:
        path: the slide.
        workers: who read it.
        fast: whether they decode its tiles directly.

    Raises:
        SlideError: the slide cannot be opened, or its decoder crashes.
        ConfigError: no worker can be started.
    """

    def __init__(self, path: Path, workers: Workers, *, fast: bool = True) -> None:
        super().__init__(path)
        self._workers, self._slide = workers, SlideFile.of(path, fast=fast)
        for name, value in workers.open(self._slide).items():
            setattr(self, name, value)

    def reduction_for(self, level: int, ratio_x: float, ratio_y: float) -> int:
        reduction: int = self._workers.ask(self._slide, "reduction_for", level, ratio_x, ratio_y)
        return reduction

    def _read_inside(self, level: int, level_box: Box, background_rgb: Rgb) -> Pixels:
        return self._ask(level, level_box, background_rgb, 1)

    def _read_reduced(self, level: int, reduction: int, reduced_box: Box) -> Pixels:
        return self._ask(level, reduced_box, (0, 0, 0), reduction)

    def _ask(self, level: int, box: Box, background_rgb: Rgb, reduction: int) -> Pixels:
        pixels: Pixels
        pixels, transparent = self._workers.ask(self._slide, "read_level", level, box, background_rgb, reduction)
        self.met_transparency |= transparent
        return pixels

    def _release(self) -> None:
        self._workers.close(self._slide)
