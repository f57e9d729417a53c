"""The patches of a slide: squares on a grid, those of them that hold enough tissue, and their pixels."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Size
from wholeslide.slides.notices import say_once
from wholeslide.slides.readers import Pixels
from wholeslide.slides.tissue import TissueMask
from wholeslide.slides.working import WorkingSlide

logger = logging.getLogger(__name__)

PATCH_PX = 256
LEAST_TISSUE = 0.5
#: Batches that are read, each on a thread of its own, while one is computed.
_BATCHES_AHEAD = 2


def patch_boxes(size: Size, patch_px: int) -> list[Box]:
    """Squares that cover a frame, row by row; the last of a row and of a column are shifted inwards.

    Where a side is shorter than a patch, the only one along it reaches over the frame.
    """
    tops, lefts = (_starts(length, patch_px) for length in (size.height, size.width))
    return [Box(left, top, patch_px, patch_px) for top in tops for left in lefts]


def tissue_patches(slide: WorkingSlide, patch_px: int = PATCH_PX, *, least_tissue: float = LEAST_TISSUE) -> list[Box]:
    """Those patches of a slide that hold enough tissue; there is always one.

    Where none holds enough, the one with the most is taken, and a warning says so. Where the slide is smaller than a patch, a
    message says that it is padded, and the padding counts neither as tissue nor as its lack.

    Args:
        slide: where the background is kept, all is tissue.
        patch_px: side of a patch in working pixels.
        least_tissue: the part of it that has to be tissue, 0 to 1.

    Returns:
        Boxes in working pixels of the whole slide, row by row.
    """
    size = slide.whole_size
    if min(size.width, size.height) < patch_px:
        message = "its %s pixels are padded with background to a patch of %d"
        say_once(logger, logging.WARNING, slide.path, message, size, patch_px)
    boxes, parts = patch_boxes(size, patch_px), _tissue_parts(slide.mask, patch_px)
    kept = [box for box, part in zip(boxes, parts, strict=True) if part >= least_tissue]
    if kept:
        return kept
    best = int(parts.argmax())
    message = "no patch of %d pixels is %.0f%% tissue; the one with the most, %.0f%%, stands for the slide"
    say_once(logger, logging.WARNING, slide.path, message, patch_px, 100 * least_tissue, 100 * parts[best])
    return [boxes[best]]


def read_batches(slide: WorkingSlide, whole_boxes: Sequence[Box], batch: int) -> Generator[Pixels, None, None]:
    """Patches in batches, the next ones read on threads while one is computed.

    Args:
        slide: open until the iterator ends.
        whole_boxes: in working pixels of the whole slide, all of one size; what lies beyond the slide is background.
        batch: patches at a time; the last ones may be fewer.

    Yields:
        uint8 of shape (batch, height, width, 3), not masked.

    Raises:
        SlideError: the file cannot be decoded there.
    """
    pending: deque[Future[Pixels]] = deque()
    threads = ThreadPoolExecutor(_BATCHES_AHEAD, thread_name_prefix="patches")
    try:
        for start in range(0, len(whole_boxes), batch):
            pending.append(threads.submit(_read, slide, whole_boxes[start : start + batch]))
            if len(pending) > _BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _starts(length: int, patch_px: int) -> list[int]:
    return [max(0, min(start, length - patch_px)) for start in range(0, length, patch_px)]


def _tissue_parts(mask: TissueMask, patch_px: int) -> npt.NDArray[np.float64]:
    """The part of each patch of the grid that is tissue, of what of it lies on the slide, in the order of :func:`patch_boxes`."""
    rows, columns = mask.cells.shape
    down_rc = _overlaps(mask.size.height, patch_px, rows, mask.px_per_cell)
    across_rc = _overlaps(mask.size.width, patch_px, columns, mask.px_per_cell)
    tissue = down_rc @ mask.cells.astype(np.float64) @ across_rc.T
    parts: npt.NDArray[np.float64] = tissue / np.outer(down_rc.sum(axis=1), across_rc.sum(axis=1))
    return parts.ravel()


def _overlaps(length: int, patch_px: int, cells: int, px_per_cell: int) -> npt.NDArray[np.float64]:
    """How many pixels of an axis each patch (a row) shares with each cell (a column); none beyond the slide."""
    starts = np.array(_starts(length, patch_px))[:, None]
    cell_starts = np.arange(cells) * px_per_cell
    ends = np.minimum(np.minimum(starts + patch_px, cell_starts + px_per_cell), length)
    shared: npt.NDArray[np.float64] = np.maximum(0, ends - np.maximum(starts, cell_starts)).astype(np.float64)
    return shared


def _read(slide: WorkingSlide, whole_boxes: Sequence[Box]) -> Pixels:
    return np.stack([_read_patch(slide, box) for box in whole_boxes])


def _read_patch(slide: WorkingSlide, whole_box: Box) -> Pixels:
    inside = whole_box.intersection(Box.covering(slide.whole_size))
    if inside == whole_box:
        return slide.read_whole(whole_box)
    pixels = np.full((whole_box.height, whole_box.width, 3), slide.background_rgb, np.uint8)
    pixels[inside.relative_to(whole_box).rows_columns] = slide.read_whole(inside)
    return pixels
