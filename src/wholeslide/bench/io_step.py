"""One row of ``bench io``: all of a slide at a working resolution, read in a fresh process on a number of cores."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from wholeslide.bench.io import IoCase
from wholeslide.bench.slide_reads import SlideReads, open_reads
from wholeslide.errors import ConfigError
from wholeslide.geometry import Box
from wholeslide.slides.decoders import usable_cores

_SAMPLE_PX = 128


def measure(case: IoCase) -> dict[str, Any]:
    """Time from the first to the last pixel; opening is timed apart, and what it has decoded is decoded again.

    Returns:
        ``width`` and ``height`` in working pixels, the seconds, the rate, and as a check ``mean_rgb`` of the slide's corner.

    Raises:
        ConfigError: there are fewer cores than threads, or the reader is not installed.
        SlideError: the slide cannot be read.
    """
    _keep_to(case.threads)
    begun = time.perf_counter()
    reads = open_reads(case.reader, Path(case.path), case.mpp)
    open_seconds = time.perf_counter() - begun
    reads.forget()
    begun = time.perf_counter()
    _read_all(reads, reads.boxes(), case.threads)
    seconds = time.perf_counter() - begun
    corner = Box(0, 0, _SAMPLE_PX, _SAMPLE_PX).intersection(Box.covering(reads.size))
    mean_rgb = reads.read(corner)[: corner.height, : corner.width].mean(axis=(0, 1))
    reads.close()
    return {
        "width": reads.size.width,
        "height": reads.size.height,
        "open_seconds": round(open_seconds, 4),
        "seconds": round(seconds, 4),
        "megapixels_per_second": round(reads.size.area / seconds / 1e6, 2),
        "mean_rgb": [round(float(value), 1) for value in mean_rgb],
    }


def _read_all(reads: SlideReads, boxes: Sequence[Box], threads: int) -> None:
    def read(px_box: Box) -> None:
        reads.read(px_box)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(read, px_box) for px_box in boxes]:
            done.result()


def _keep_to(cores: int) -> None:
    """Let this process use so many cores and no more, whatever threads its libraries start."""
    if cores > usable_cores():
        raise ConfigError.single(
            f"only {usable_cores()} cores", where=f"--threads {cores}", remedy="measure with no more threads than cores"
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
