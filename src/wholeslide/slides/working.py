"""One slide at the working resolution: cropped to its tissue, its background made constant."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.content import find_mask_file, slide_key
from wholeslide.slides.geojson import rasterize, read_polygons
from wholeslide.slides.notices import say_once
from wholeslide.slides.opening import open_slide
from wholeslide.slides.planes import Mask
from wholeslide.slides.prepared import PreparedDescription, read_prepared
from wholeslide.slides.readers import BLACK, WHITE, Pixels, Rgb, SlideReader, slide_error
from wholeslide.slides.scale import SMALLEST_SIDE_PX, Sampling, resolve_l0_mpp, sample_at, working_sampling
from wholeslide.slides.tissue import TissueMask, find_tissue, is_dark

logger = logging.getLogger(__name__)

MASK_MPP = 8.0
MASK_SIDE_CELLS = 1024
CHUNK_LEVEL_PX = 2048


class WorkingSlide:
    """One file at the working resolution. Reads are thread-safe until :meth:`close`.

    Three frames: level-0 pixels of the file (``l0_``), working pixels of the whole slide (``whole_``), and working
    pixels counted from the upper left corner of the tissue's bounding box (``px_``), which is what :meth:`read` takes.

    Attributes:
        path: the file.
        size: width and height in working pixels, cropped to the tissue's bounding box.
        whole_size: the same before the crop.
        working_mpp: microns per working pixel; ``None`` where the file has no scale.
        whole_box: the crop, in working pixels of the whole slide.
        background: ``constant`` or ``keep``.
        background_rgb: white, or black on dark slides.
        mask: the tissue, in working pixels of the whole slide.
    """

    def __init__(
        self,
        reader: SlideReader,
        sampling: Sampling,
        mask: TissueMask,
        *,
        working_mpp: Mpp | None,
        background: Literal["constant", "keep"],
        background_rgb: Rgb,
        make_key: Callable[[], str],
    ) -> None:
        self.path = reader.path
        self.reader = reader
        self.sampling = sampling
        self.mask = mask
        self.working_mpp = working_mpp
        self.background = background
        self.background_rgb = background_rgb
        self.whole_size = sampling.size
        self.whole_box = Box.covering(sampling.size) if background == "keep" else _crop_box(mask)
        self._make_key = make_key

    @property
    def l0_mpp(self) -> Mpp | None:
        """Microns per level-0 pixel; ``None`` where the file has no scale."""
        if self.working_mpp is None:
            return None
        return Mpp(self.working_mpp.x / self.sampling.downsample_x, self.working_mpp.y / self.sampling.downsample_y)

    @property
    def size(self) -> Size:
        return self.whole_box.size

    @property
    def tissue_fraction(self) -> float:
        """The part of the whole slide's area that is tissue; 1 where the background is kept."""
        return self.mask.fraction

    @property
    def l0_box(self) -> Box:
        """The part of level 0 that the working pixels cover, rounded outwards."""
        level = self.reader.levels[self.sampling.level]
        l0_x, l0_y = (self.sampling.reduction * downsample for downsample in (level.downsample_x, level.downsample_y))
        box = self.sampling.resampling.level_box(self.whole_box)
        l0_box = Box.from_edges(
            int(box.left * l0_x), int(box.top * l0_y), int(-(-box.right * l0_x // 1)), int(-(-box.bottom * l0_y // 1))
        )
        return l0_box.intersection(Box.covering(self.reader.l0_size))

    def l0_from_whole(self, whole_n2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Level-0 pixels of points of the whole slide, both (N, 2) with x before y."""
        sampling, level = self.sampling, self.reader.levels[self.sampling.level]
        axes = (sampling.resampling.x, sampling.resampling.y)
        origin = (
            np.array([axis.origin for axis in axes]) * sampling.reduction * (level.downsample_x, level.downsample_y)
        )
        return origin + whole_n2 * (sampling.downsample_x, sampling.downsample_y)

    @cached_property
    def key(self) -> str:
        """A hash of the file's content and of every parameter that its working pixels depend on."""
        return self._make_key()

    def read(self, px_box: Box) -> Pixels:
        """Working pixels of a box; a pixel does not depend on the box that it is read with.

        Args:
            px_box: inside :attr:`size`.

        Returns:
            uint8 of shape (height, width, 3), area-averaged from the best level, the background constant where the
            configuration says so.

        Raises:
            SlideError: the file cannot be decoded there.
        """
        assert Box.covering(self.size).contains(px_box), (px_box, self.size)
        whole_box = px_box.shifted(self.whole_box.left, self.whole_box.top)
        return self._read(whole_box, masked=self.background == "constant")

    def is_background(self, px_box: Box) -> bool:
        """Whether the mask says that a box holds no tissue; never where the background is kept."""
        return self.background == "constant" and not self.mask.touches(
            px_box.shifted(self.whole_box.left, self.whole_box.top)
        )

    def read_whole(self, whole_box: Box) -> Pixels:
        """Unmasked working pixels of a box of the whole slide, before the crop to the tissue."""
        assert Box.covering(self.whole_size).contains(whole_box), (whole_box, self.whole_size)
        return self._read(whole_box, masked=False)

    def thumbnail(self, side_px: int) -> tuple[Pixels, int]:
        """The whole slide, unmasked, its longer side at most ``side_px``; and working pixels per thumbnail pixel."""
        step = max(1, -(-max(self.whole_size.width, self.whole_size.height) // side_px))
        pixels, _ = _thumbnail(self.reader, self.sampling, step, self.background_rgb)
        return pixels, step

    def close(self) -> None:
        """Release the file. May be called twice."""
        self.reader.close()

    def _read(self, whole_box: Box, *, masked: bool) -> Pixels:
        """Read in chunks of a bounded number of stored pixels; chunks without tissue are not decoded."""
        resampling = self.sampling.resampling
        step_x = max(1, int(CHUNK_LEVEL_PX / resampling.x.ratio))
        step_y = max(1, int(CHUNK_LEVEL_PX / resampling.y.ratio))
        if whole_box.width <= step_x and whole_box.height <= step_y:
            return self._read_chunk(whole_box, masked=masked)
        out = np.empty((whole_box.height, whole_box.width, 3), np.uint8)
        for top in range(whole_box.top, whole_box.bottom, step_y):
            for left in range(whole_box.left, whole_box.right, step_x):
                chunk = Box(left, top, step_x, step_y).intersection(whole_box)
                out[chunk.relative_to(whole_box).rows_columns] = self._read_chunk(chunk, masked=masked)
        return out

    def _read_chunk(self, whole_box: Box, *, masked: bool) -> Pixels:
        if masked and not self.mask.touches(whole_box):
            return np.full((whole_box.height, whole_box.width, 3), self.background_rgb, np.uint8)
        pixels = sample(self.reader, self.sampling, whole_box, self.background_rgb)
        if masked and not self.mask.covers(whole_box):
            pixels = np.where(self.mask.pixels(whole_box)[..., None], pixels, np.uint8(self.background_rgb[0]))
        return pixels


def sample(reader: SlideReader, sampling: Sampling, whole_box: Box, background_rgb: Rgb) -> Pixels:
    """Area-averaged pixels of a box at a sampling: uint8 of shape (height, width, 3)."""
    level_box = sampling.resampling.level_box(whole_box)
    level_hwc = reader.read_level(sampling.level, level_box, background_rgb, reduction=sampling.reduction)
    return sampling.resampling.average(level_hwc, whole_box)


def open_working_slide(path: Path, config: SlideConfig, *, mpp: float | None = None, fast: bool = True) -> WorkingSlide:
    """Open a slide at the working resolution and find its tissue.

    Args:
        path: a slide, an image, or the folder of a DICOM slide.
        config: the resolution and what becomes of the background.
        mpp: microns per stored pixel, where the manifest gives it for this slide.
        fast: decode stored tiles directly, where their layout is understood.

    Raises:
        SlideError: the file is missing or unreadable, has no usable scale or one coarser than the target, is smaller
            than 32 working pixels a side, or has no tissue.
    """
    reader = open_slide(path, fast=fast, icc=config.icc, decoders=config.decoders)
    try:
        return _open(reader, config, mpp)
    except BaseException:
        reader.close()
        raise


def read_working_mpp(path: Path, config: SlideConfig, *, mpp: float | None = None) -> Mpp | None:
    """Microns per working pixel, told by the file's header alone; ``None`` where the file has no scale.

    Raises:
        SlideError: the file is missing, cannot be opened, or has no resolution that the configuration asks for.
    """
    with closing(open_slide(path, fast=False, decoders=config.decoders)) as reader:
        prepared = read_prepared(reader, config)
        if prepared is not None:
            return prepared.working_mpp
        l0_mpp = resolve_l0_mpp(reader, config, mpp)
        return _working_mpp(l0_mpp, working_sampling(reader, config, l0_mpp))


def _working_mpp(l0_mpp: Mpp | None, sampling: Sampling) -> Mpp | None:
    return Mpp(l0_mpp.x * sampling.downsample_x, l0_mpp.y * sampling.downsample_y) if l0_mpp else None


def _open(reader: SlideReader, config: SlideConfig, mpp: float | None) -> WorkingSlide:
    check_readable(reader)
    prepared = read_prepared(reader, config)
    if prepared is not None:
        return _open_prepared(reader, prepared)
    l0_mpp = resolve_l0_mpp(reader, config, mpp)
    sampling = working_sampling(reader, config, l0_mpp)
    working_mpp = _working_mpp(l0_mpp, sampling)
    background = config.background
    if background == "auto":
        background = "keep" if reader.is_plain_image else "constant"
    px_per_cell = _px_per_cell(sampling, working_mpp)
    thumbnail, scanned = _thumbnail(reader, sampling, px_per_cell)
    mask = TissueMask.everything(sampling.size)
    if background == "constant":
        mask = _find_mask(reader.path, config, sampling, thumbnail, scanned, px_per_cell)
    return WorkingSlide(
        reader,
        sampling,
        mask,
        working_mpp=working_mpp,
        background=background,
        background_rgb=BLACK if is_dark(thumbnail, scanned) else WHITE,
        make_key=lambda: slide_key(reader.path, config, mpp),
    )


def _open_prepared(reader: SlideReader, prepared: PreparedDescription) -> WorkingSlide:
    return WorkingSlide(
        reader,
        sample_at(reader, 1.0, 1.0, snap=True),
        prepared.mask,
        working_mpp=prepared.working_mpp,
        background=prepared.background,
        background_rgb=prepared.background_rgb,
        make_key=lambda: prepared.key,
    )


def _find_mask(
    path: Path, config: SlideConfig, sampling: Sampling, thumbnail: Pixels, scanned: Mask, px_per_cell: int
) -> TissueMask:
    mask_file = find_mask_file(path, config)
    if config.mask_dir is not None and mask_file is None:
        missing = "no mask for it in %s; the tissue is found automatically"
        say_once(logger, logging.WARNING, path, missing, config.mask_dir)
    cells = find_tissue(thumbnail, scanned) if mask_file is None else _drawn(mask_file, sampling, px_per_cell)
    mask = TissueMask(cells, px_per_cell, sampling.size)
    _require_tissue(mask, path, mask_file)
    return mask


def check_readable(reader: SlideReader, side_px: int = 256) -> None:
    """Read a little of every level: some files open and fail only when pixels are decoded.

    Raises:
        SlideError: a level cannot be decoded at its centre or its last corner.
    """
    for index, level in enumerate(reader.levels):
        everything = Box.covering(level.size)
        centre = Box(level.size.width // 2, level.size.height // 2, side_px, side_px).intersection(everything)
        corner = Box(max(0, level.size.width - side_px), max(0, level.size.height - side_px), side_px, side_px)
        for level_box in (centre, corner.intersection(everything)):
            reader.read_level(index, level_box)


def _px_per_cell(sampling: Sampling, working_mpp: Mpp | None) -> int:
    """The side of a mask cell: about 8 microns; without a scale, a thousandth of the slide's longer side."""
    if working_mpp is not None:
        return max(1, round(MASK_MPP / working_mpp.mean))
    return max(1, -(-max(sampling.size.width, sampling.size.height) // MASK_SIDE_CELLS))


def _thumbnail(
    reader: SlideReader, sampling: Sampling, px_per_cell: int, background_rgb: Rgb = WHITE
) -> tuple[Pixels, Mask]:
    """A thumbnail of one pixel a cell over a background, and which of its pixels were scanned.

    What is transparent shows the background: it differs between white and black.
    """
    coarse = sample_at(reader, sampling.downsample_x * px_per_cell, sampling.downsample_y * px_per_cell, snap=False)
    cells = Box(0, 0, -(-sampling.size.width // px_per_cell), -(-sampling.size.height // px_per_cell))
    thumbnail = np.empty((cells.height, cells.width, 3), np.uint8)
    scanned: Mask = np.ones(thumbnail.shape[:2], np.bool_)
    for chunk, pixels in _thumbnail_chunks(reader, coarse, cells, background_rgb):
        thumbnail[chunk.rows_columns] = pixels
    if reader.met_transparency:
        for chunk, inverse in _thumbnail_chunks(reader, coarse, cells, BLACK if background_rgb == WHITE else WHITE):
            difference = np.abs(thumbnail[chunk.rows_columns].astype(np.int16) - inverse)
            scanned[chunk.rows_columns] = difference.max(axis=2) < 128
    return thumbnail, scanned


def _thumbnail_chunks(
    reader: SlideReader, coarse: Sampling, cells: Box, background_rgb: Rgb
) -> Iterator[tuple[Box, Pixels]]:
    """The boxes that a thumbnail is read in, of a bounded number of stored pixels each, and their pixels."""
    step_x = max(1, int(CHUNK_LEVEL_PX / coarse.resampling.x.ratio))
    step_y = max(1, int(CHUNK_LEVEL_PX / coarse.resampling.y.ratio))
    for top in range(0, cells.height, step_y):
        for left in range(0, cells.width, step_x):
            chunk = Box(left, top, step_x, step_y).intersection(cells)
            yield chunk, sample(reader, coarse, chunk, background_rgb)


def _drawn(mask_file: Path, sampling: Sampling, px_per_cell: int) -> Mask:
    l0_px_per_cell = (sampling.downsample_x * px_per_cell, sampling.downsample_y * px_per_cell)
    cells = Size(-(-sampling.size.width // px_per_cell), -(-sampling.size.height // px_per_cell))
    return rasterize(read_polygons(mask_file), l0_px_per_cell, cells)


def _require_tissue(mask: TissueMask, path: Path, mask_file: Path | None) -> None:
    if mask.cells.any():
        return
    if mask_file is not None:
        raise slide_error("the mask's polygons lie outside the slide", mask_file, "export it from the same slide")
    remedy = (
        "look at it with `wholeslide inspect --background keep --overlay DIR`; leave it out, "
        "or train with masks that are drawn (--mask-dir) or with --background keep"
    )
    raise slide_error("no tissue found", path, remedy)


def _crop_box(mask: TissueMask) -> Box:
    """The tissue's bounding box, widened to at least 32 pixels a side where the slide has them."""
    box = mask.px_bounds
    left, width = _widen(box.left, box.width, mask.size.width)
    top, height = _widen(box.top, box.height, mask.size.height)
    return Box(left, top, width, height)


def _widen(start: int, length: int, limit: int) -> tuple[int, int]:
    if length >= SMALLEST_SIDE_PX:
        return start, length
    start = max(0, min(start - (SMALLEST_SIDE_PX - length) // 2, limit - SMALLEST_SIDE_PX))
    return start, min(SMALLEST_SIDE_PX, limit)
