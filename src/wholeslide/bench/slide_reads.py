"""The ways in which a slide can be read at a working resolution: ours, and those that are usual."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image

from wholeslide.baselines.patches import PATCH_PX
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import Pixels
from wholeslide.slides.resample import AxisMap, Resampling
from wholeslide.slides.working import open_working_slide

_REGION_PX = 2048


class SlideReads(ABC):
    """An open slide at a working resolution.

    Attributes:
        size: in working pixels.
        side_px: of the boxes in which it is read.
    """

    size: Size
    side_px: int

    def boxes(self) -> list[Box]:
        """Squares that cover the slide, row by row; the last ones may reach over it."""
        side, size = self.side_px, self.size
        return [
            Box(left, top, side, side) for top in range(0, size.height, side) for left in range(0, size.width, side)
        ]

    @abstractmethod
    def forget(self) -> None:
        """Drop what opening has decoded: of a coarse slide that may be all that is read."""

    @abstractmethod
    def read(self, px_box: Box) -> Pixels:
        """Working pixels of a box, (h, w, 3); of one that reaches over the slide at least what lies inside. Thread-safe."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""


class WorkingReads(SlideReads):
    """Large regions, area-averaged by :class:`~wholeslide.slides.working.WorkingSlide`.

    Args:
        path: the slide.
        mpp: microns per working pixel.
        fast: decode stored tiles directly, and not through OpenSlide.
    """

    side_px = _REGION_PX

    def __init__(self, path: Path, mpp: float, *, fast: bool) -> None:
        self._slide = open_working_slide(path, SlideConfig(mpp=mpp, background="keep"), fast=fast)
        self._fast = fast
        self.size = self._slide.size

    def forget(self) -> None:
        sampling = self._slide.sampling
        self._slide.reader.close()
        self._slide.reader = open_slide(self._slide.path, fast=self._fast)
        x, y = sampling.resampling.x, sampling.resampling.y
        self._slide.reader.reduction_for(sampling.level, x.ratio, y.ratio)  # looks at a tile or two, as opening does

    def read(self, px_box: Box) -> Pixels:
        return self._slide.read(px_box.intersection(Box.covering(self.size)))

    def close(self) -> None:
        self._slide.close()


class PatchReads(SlideReads):
    """Patches one by one through OpenSlide, as public pipelines do: ``read_region`` at the best level, RGB, resize."""

    side_px = PATCH_PX

    def __init__(self, path: Path, mpp: float) -> None:
        self._slide = openslide.OpenSlide(str(path))
        l0_mpp = float(self._slide.properties[openslide.PROPERTY_NAME_MPP_X])
        self._l0_per_px = mpp / l0_mpp
        self._level = self._slide.get_best_level_for_downsample(self._l0_per_px)
        self._level_per_px = self._l0_per_px / self._slide.level_downsamples[self._level]
        width, height = self._slide.dimensions
        self.size = Size(int(width / self._l0_per_px), int(height / self._l0_per_px))

    def forget(self) -> None:
        """Opening has decoded nothing."""

    def read(self, px_box: Box) -> Pixels:
        l0_start = (round(px_box.left * self._l0_per_px), round(px_box.top * self._l0_per_px))
        level_size = (round(px_box.width * self._level_per_px), round(px_box.height * self._level_per_px))
        patch = self._slide.read_region(l0_start, self._level, level_size).convert("RGB")
        if patch.size != (px_box.width, px_box.height):
            patch = patch.resize((px_box.width, px_box.height), Image.Resampling.BICUBIC)
        return np.asarray(patch)

    def close(self) -> None:
        self._slide.close()


class FastslideReads(SlideReads):
    """Large regions through the package ``fastslide``, area-averaged in our way."""

    side_px = _REGION_PX

    def __init__(self, path: Path, mpp: float) -> None:
        self._slide: Any = importlib.import_module("fastslide").FastSlide.from_file_path(path)
        l0_per_px = mpp / self._slide.mpp[0]
        self._level = self._slide.get_best_level_for_downsample(l0_per_px)
        axis = AxisMap(0, l0_per_px / self._slide.level_downsamples[self._level])
        self._resampling = Resampling(axis, axis)
        width, height = self._slide.level_dimensions[self._level]
        self.size = Size(int(width / axis.ratio), int(height / axis.ratio))

    def forget(self) -> None:
        """Opening has decoded nothing."""

    def read(self, px_box: Box) -> Pixels:
        inside = px_box.intersection(Box.covering(self.size))
        level_box = self._resampling.level_box(inside)
        image = self._slide.read_region(
            (level_box.left, level_box.top), self._level, (level_box.width, level_box.height)
        )
        return self._resampling.average(np.ascontiguousarray(image.numpy()[..., :3]), inside)

    def close(self) -> None:
        self._slide.close()


def open_reads(reader: str, path: Path, mpp: float) -> SlideReads:
    """A slide, opened by one of the readers of ``bench io``.

    Raises:
        ConfigError: the reader is not installed.
        SlideError: the slide cannot be read.
    """
    if reader == "openslide-patch":
        return PatchReads(path, mpp)
    if reader != "fastslide":
        return WorkingReads(path, mpp, fast=reader == "fast")
    if importlib.util.find_spec("fastslide") is None:
        raise ConfigError.single(
            "the package fastslide is not installed", where="--readers fastslide", remedy="pip install fastslide==0.8.1"
        )
    return FastslideReads(path, mpp)
