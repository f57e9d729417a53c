"""A slide as its patches of tissue: their pixels while an encoder is trained, and their features when it no longer is."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wholeslide.baselines.bag_cache import BagCache
from wholeslide.baselines.encoder import Features
from wholeslide.baselines.extraction import BATCH
from wholeslide.baselines.patches import read_batches, tissue_patches
from wholeslide.draws import Draws
from wholeslide.geometry import Box, Size
from wholeslide.slides.augment import Augmentation, draw_augmentation
from wholeslide.slides.config import AugmentationConfig
from wholeslide.slides.readers import Pixels, unreadable
from wholeslide.slides.view import DEFAULT_MEAN_GREY
from wholeslide.slides.working import WorkingSlide


class PatchView:
    """The patches of one slide, which is opened when it is first needed.

    Args:
        path: the slide's.
        open_slide: opens it, at the resolution of the patches.
        bags: keeps features of slides, once the encoder is trained.
        patch_px: side of a patch in working pixels.
        least_tissue: the part of a patch that has to be tissue.
        augmentation: how single patches are varied; ``None``: not at all.
        mean_grey: of the training tissue, in [0, 1]; contrast jitter blends with it.

    Attributes:
        waited_seconds: how long whoever reads patches has stood still for pixels.
    """

    def __init__(
        self,
        path: Path,
        open_slide: Callable[[], WorkingSlide],
        bags: BagCache,
        *,
        patch_px: int,
        least_tissue: float,
        augmentation: AugmentationConfig | None = None,
        mean_grey: float = DEFAULT_MEAN_GREY,
    ) -> None:
        self.waited_seconds = 0.0
        self._path, self._open, self._bags = path, open_slide, bags
        self._patch_px, self._least_tissue = patch_px, least_tissue
        # A patch is cropped by nobody: it is as large as the network takes it.
        self._augmentation = None if augmentation is None else replace(augmentation, crop_probability=0.0)
        self._mean_grey = mean_grey
        self._opened: WorkingSlide | None = None

    @cached_property
    def boxes(self) -> list[Box]:
        """The patches in working pixels of the whole slide, row by row; there is always one."""
        return tissue_patches(self._slide(), self._patch_px, least_tissue=self._least_tissue)

    def batches(self) -> Generator[Pixels, None, None]:
        """All patches as they are, a bounded number at a time: uint8, (B, s, s, 3).

        Raises:
            SlideError: the file cannot be decoded.
        """
        return self._read(self.boxes)

    def varied(self, chosen: Sequence[int], draws: Draws) -> npt.NDArray[np.float32]:
        """Some patches, each flipped, turned and coloured by draws of its own.

        Args:
            chosen: their positions among :attr:`boxes`.
            draws: of the slide in this epoch.

        Returns:
            (N, s, s, 3), from 0 to 255.

        Raises:
            SlideError: the file cannot be decoded.
        """
        rng = draws.rng("augmentation")
        with closing(self._read([self.boxes[number] for number in chosen])) as batches:
            return np.stack([self._vary(patch, rng) for patches_bhwc in batches for patch in patches_bhwc])

    def kept_features(self) -> Features:
        """The features of all patches, (N, D), by an encoder whose weights do not change any more; computed once.

        Raises:
            SlideError: the file cannot be decoded.
            FeatureError: the encoder gives what are no finite numbers.
            RunError: they cannot be written.
        """
        return self._bags.bag(self._path, self._slide).features_nd

    def l0_patches(self) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
        """Upper left corners, (N, 2), and width and height of the patches, in level-0 pixels."""
        slide = self._slide()
        corners_n2 = np.array([(box.left, box.top) for box in self.boxes], dtype=np.float64)
        side, sampling = self._patch_px, slide.sampling
        return slide.l0_from_whole(corners_n2), (side * sampling.downsample_x, side * sampling.downsample_y)

    def prefetch(self, limit_bytes: int) -> None:
        """Open the slide, unless its features are kept. Its pixels are read as they are needed."""
        if not self._bags.holds(self._path):
            self._slide()

    def close(self) -> None:
        """Release the slide. May be called twice."""
        if self._opened is not None:
            self._opened.close()

    def _slide(self) -> WorkingSlide:
        if self._opened is None:
            try:
                self._opened = self._open()
            except OSError as error:
                raise unreadable(self._path, error) from error
        return self._opened

    def _read(self, boxes: Sequence[Box]) -> Generator[Pixels, None, None]:
        with closing(read_batches(self._slide(), boxes, BATCH)) as batches:
            while True:
                begun = time.perf_counter()
                patches_bhwc = next(batches, None)
                self.waited_seconds += time.perf_counter() - begun
                if patches_bhwc is None:
                    return
                yield patches_bhwc

    def _vary(self, patch_hwc: Pixels, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        size = Size(self._patch_px, self._patch_px)
        drawn = Augmentation.none(size)
        if self._augmentation is not None:
            drawn = draw_augmentation(size, self._augmentation, rng, self._mean_grey)
        turned = drawn.orientation.apply(patch_hwc)
        if drawn.jitter is None:
            return turned.astype(np.float32)
        return np.float32(255) * drawn.jitter.apply(turned)
