"""Slides rewritten at the working resolution, so that training reads a small file instead of a gigapixel one.

A prepared slide is one tiled, pyramidal TIFF of the whole slide, neither cropped nor masked, without label or macro
image, that QuPath and OpenSlide open. The tissue mask and the parameters travel in its description, so opening it gives
the same view as the original. Tiles are JPEG of quality 95 without chroma subsampling, finer than what scanners store
themselves and half the size of a lossless file or less; ``lossless`` keeps every pixel.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import imagecodecs
import numpy as np
import tifffile

from wholeslide import __version__
from wholeslide.errors import Problem, RunError, SlideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.content import slide_key
from wholeslide.slides.files import cannot_write, part_name, write_atomically
from wholeslide.slides.lock import alone_in
from wholeslide.slides.prepared import describe_prepared
from wholeslide.slides.readers import Pixels
from wholeslide.slides.working import WorkingSlide, open_working_slide

logger = logging.getLogger(__name__)

TILE_PX = 256
JPEG_QUALITY = 95
PYRAMID_STEP = 4
SMALLEST_LEVEL_PX = 1024
ESTIMATE_TILES = 48
LARGEST_CLASSIC_BYTES = 2**31
SPOOL_PREFIX = ".spool-"


@dataclass(frozen=True)
class Prepared:
    """A prepared slide: where it lies, its size, and whether it was there before."""

    path: Path
    size_bytes: int
    was_there: bool


def find_prepared(cache: Path, path: Path, config: SlideConfig, *, mpp: float | None = None) -> Path | None:
    """The prepared file of a slide for these parameters; ``None`` where there is none.

    Raises:
        SlideError: the slide itself cannot be read.
    """
    prepared = _prepared_path(cache, path, config, mpp)
    return prepared if prepared.exists() else None


def prepare(
    rows: Iterable[tuple[Path, float | None]],
    cache: Path,
    config: SlideConfig,
    *,
    lossless: bool = False,
    progress: Callable[[Prepared], None] | None = None,
) -> list[Prepared]:
    """Prepare slides into a folder, skipping those that are there; so an interrupted run goes on where it stopped.

    What a killed run had begun is removed first.

    Args:
        rows: each slide's file, and its microns per pixel where the manifest gives them.
        cache: the folder, made where it is missing.
        config: the resolution and what becomes of the background.
        lossless: Deflate instead of JPEG.
        progress: told of every slide that is done.

    Raises:
        SlideError: slides cannot be read; raised at the end, all of them together, when the others are done.
        RunError: the disk is full, the folder cannot be written, or another process prepares slides into it.
    """
    done: list[Prepared] = []
    problems: list[Problem] = []
    with alone_in(cache):
        _remove_leftovers(cache)
        for path, mpp in rows:
            try:
                done.append(prepare_slide(path, cache, config, mpp=mpp, lossless=lossless))
            except SlideError as error:
                problems += error.problems
                continue
            if progress is not None:
                progress(done[-1])
    if problems:
        raise SlideError(problems)
    return done


def prepare_slide(
    path: Path, cache: Path, config: SlideConfig, *, mpp: float | None = None, lossless: bool = False
) -> Prepared:
    """Prepare one slide; nothing is left in the cache where it fails.

    Raises:
        SlideError: the slide cannot be read.
        RunError: the disk is full, or would be, or the folder cannot be written.
    """
    out = _prepared_path(cache, path, config, mpp)
    if out.exists():
        return Prepared(out, out.stat().st_size, was_there=True)
    slide = open_working_slide(path, config, mpp=mpp)
    try:
        _require_space(cache, out, estimate_prepared_bytes(slide, lossless=lossless))
        with write_atomically(out) as beside, tempfile.TemporaryDirectory(dir=cache, prefix=SPOOL_PREFIX) as spool:
            _write_pyramid(slide, beside, Path(spool), describe_prepared(slide, config), lossless=lossless)
    finally:
        slide.close()
    return Prepared(out, out.stat().st_size, was_there=False)


def estimate_prepared_bytes(slide: WorkingSlide, *, lossless: bool = False) -> int:
    """About how many bytes the prepared slide will take, from a sample of its tiles."""
    boxes = list(_tile_boxes(slide.whole_size))
    drawn = np.random.default_rng(0).permutation(len(boxes))[:ESTIMATE_TILES]
    chosen = [boxes[index] for index in drawn]
    encoded = [len(_encode(slide.read_whole(box), lossless=lossless)) for box in chosen]
    mean_bytes = sum(encoded) / sum(box.size.area for box in chosen)
    pyramid = 1 / (1 - 1 / PYRAMID_STEP**2)
    return int(mean_bytes * slide.whole_size.area * pyramid) + 4096


def _remove_leftovers(cache: Path) -> None:
    """Remove what a killed process had begun; no other process is at work in the cache."""
    for beside in cache.glob(part_name("*.tif")):
        beside.unlink()
    for spool in cache.glob(f"{SPOOL_PREFIX}*"):
        shutil.rmtree(spool)


def _prepared_path(cache: Path, path: Path, config: SlideConfig, mpp: float | None) -> Path:
    return cache / f"{path.stem}.{slide_key(path, config, mpp)[:16]}.tif"


def _require_space(cache: Path, out: Path, estimated_bytes: int) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(cache).free
    except OSError as error:
        raise cannot_write(out, error) from error
    if estimated_bytes > free_bytes:
        what = (
            f"the disk is full: about {estimated_bytes / 2**20:.0f} MiB are needed, {free_bytes / 2**20:.0f} are free"
        )
        raise RunError([Problem(what, str(out), "free some space, or choose another folder")])


def _encode(pixels: Pixels, *, lossless: bool) -> bytes:
    if lossless:
        return bytes(imagecodecs.deflate_encode(pixels.tobytes(), level=6))
    return bytes(imagecodecs.jpeg_encode(np.ascontiguousarray(pixels), level=JPEG_QUALITY, subsampling="444"))


def _tile_boxes(size: Size) -> Iterator[Box]:
    for top in range(0, size.height, TILE_PX):
        for left in range(0, size.width, TILE_PX):
            yield Box(left, top, TILE_PX, TILE_PX).intersection(Box.covering(size))


def _write_pyramid(slide: WorkingSlide, out: Path, spool: Path, description: str, *, lossless: bool) -> None:
    """Level 0 is read from the slide band by band; each next level from what the one before left in a spool file."""
    whole_size = slide.whole_size
    bands: Iterator[Pixels] = (
        slide.read_whole(Box(0, top, whole_size.width, TILE_PX).intersection(Box.covering(whole_size)))
        for top in range(0, whole_size.height, TILE_PX)
    )
    size, downsample = whole_size, 1
    with tifffile.TiffWriter(out, bigtiff=whole_size.area * 3 > LARGEST_CLASSIC_BYTES) as writer:
        while True:
            smaller = Size(size.width // PYRAMID_STEP, size.height // PYRAMID_STEP)
            is_last = max(size.width, size.height) <= SMALLEST_LEVEL_PX
            with (spool / f"level-{downsample}").open("w+b") as stream:
                tiles = _cut_tiles(bands if is_last else _spooling(bands, smaller, stream), size)
                writer.write(tiles, **_page_options(slide.working_mpp, size, downsample, description, lossless))
                if is_last:
                    return
            size, downsample = smaller, downsample * PYRAMID_STEP
            bands = _read_bands(spool / f"level-{downsample // PYRAMID_STEP}", size)


def _page_options(
    working_mpp: Mpp | None, size: Size, downsample: int, description: str, lossless: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "shape": (size.height, size.width, 3),
        "dtype": np.uint8,
        "photometric": "rgb",
        "tile": (TILE_PX, TILE_PX),
        "metadata": None,
        "software": f"wholeslide {__version__}",
        "maxworkers": 1,
        "description": description if downsample == 1 else None,
        "subfiletype": 0 if downsample == 1 else 1,
    }
    if lossless:
        options |= {"compression": "deflate", "predictor": True}
    else:
        options |= {"compression": "jpeg", "compressionargs": {"level": JPEG_QUALITY}, "subsampling": (1, 1)}
    if working_mpp is not None:
        options["resolution"] = (1e4 / (working_mpp.x * downsample), 1e4 / (working_mpp.y * downsample))
        options["resolutionunit"] = "CENTIMETER"
    return options


def _cut_tiles(bands: Iterator[Pixels], size: Size) -> Iterator[Pixels]:
    """Tiles of 256 x 256, row by row; the last ones are filled up by repeating the border."""
    for band in bands:
        for left in range(0, size.width, TILE_PX):
            tile = band[:, left : left + TILE_PX]
            missing = ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0))
            yield np.pad(tile, missing, mode="edge")


def _spooling(bands: Iterator[Pixels], smaller: Size, stream: IO[bytes]) -> Iterator[Pixels]:
    """Pass bands on, and append each, averaged over 4 x 4 pixels, to a file."""
    for band in bands:
        rows = band.shape[0] // PYRAMID_STEP
        kept = band[: rows * PYRAMID_STEP, : smaller.width * PYRAMID_STEP].astype(np.uint16)
        grouped = kept.reshape(rows, PYRAMID_STEP, smaller.width, PYRAMID_STEP, 3).sum(axis=(1, 3), dtype=np.uint16)
        stream.write(((grouped + PYRAMID_STEP**2 // 2) // PYRAMID_STEP**2).astype(np.uint8).tobytes())
        yield band
    stream.flush()


def _read_bands(file: Path, size: Size) -> Iterator[Pixels]:
    row_bytes = size.width * 3
    with file.open("rb") as stream:
        for top in range(0, size.height, TILE_PX):
            data = stream.read(min(TILE_PX, size.height - top) * row_bytes)
            yield np.frombuffer(data, np.uint8).reshape(-1, size.width, 3)
