"""``bench io``: working pixels a second, one process a row."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wholeslide.bench.children import measured_row
from wholeslide.bench.choices import choices, numbers, sizes
from wholeslide.bench.config import IoBenchConfig
from wholeslide.bench.pyramid import FORMATS, texture_tiles, write_pyramid
from wholeslide.bench.result import Result, Row
from wholeslide.geometry import Size

_log = logging.getLogger(__name__)

READERS = ("fast", "openslide-patch", "openslide-region", "fastslide")


@dataclass(frozen=True, kw_only=True)
class IoCase:
    """One row: all of the slide at ``path``, which is ``width`` by ``height`` at 5x, read at ``mpp`` on so many ``threads``."""

    path: str
    width: int
    height: int
    format: str
    reader: str
    threads: int
    mpp: float


def bench_io(
    config: IoBenchConfig, result: Result | None = None, *, on_row: Callable[[Row], None] | None = None
) -> Result:
    """Measure every combination that ``config`` names. Slides are read right after they were written: from memory, not from disk.

    Args:
        config: the combinations.
        result: gets the rows; rows that it has of a call that was cut off are not measured again.
        on_row: is given each row that was measured.

    Returns:
        The result. A row that could not be measured says ``"measured": false`` and why.

    Raises:
        ConfigError: a choice is not among those that exist.
        SlideError: the slide with the texture cannot be read.
        RunError: the disk is full.
    """
    combinations = list(_combinations(config))
    patterns = texture_tiles(config.texture, seed=config.seed)
    result = result or Result()
    result.begin()
    with tempfile.TemporaryDirectory(prefix="wholeslide-bench-") as folder:
        slide = Path(folder) / "slide.svs"
        for (size, stored_as), group in itertools.groupby(combinations[len(result.rows) :], key=_slide_of):
            write_pyramid(slide, size, patterns, seed=config.seed, stored_as=stored_as)
            for values in group:
                row = _measured(IoCase(path=str(slide), **values))
                result.add(row)
                if on_row is not None:
                    on_row(row)
    result.finish()
    return result


def _slide_of(values: dict[str, Any]) -> tuple[Size, str]:
    return Size(values["width"], values["height"]), values["format"]


def _combinations(config: IoBenchConfig) -> Iterable[dict[str, Any]]:
    for size, stored_as, reader, threads in itertools.product(
        sizes(config.sizes),
        choices("formats", config.formats, tuple(FORMATS)),
        choices("readers", config.readers, READERS),
        numbers("threads", config.threads),
    ):
        yield {
            "width": size.width,
            "height": size.height,
            "format": stored_as,
            "reader": reader,
            "threads": threads,
            "mpp": config.mpp,
        }


def _measured(case: IoCase) -> dict[str, Any]:
    """The row of one case, from a process of its own."""
    facts = {key: value for key, value in asdict(case).items() if key != "path"}
    row = measured_row("wholeslide.bench.io_row", asdict(case), facts)
    if not row.get("measured", True):
        _log.warning("%s on %d threads could not be measured: %s", case.reader, case.threads, row["reason"])
    return row
