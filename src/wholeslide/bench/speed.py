"""``bench speed``: seconds from a file to its prediction, one process a row."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wholeslide.bench.children import measured_row
from wholeslide.bench.choices import choices, fractions, numbers, sizes
from wholeslide.bench.config import SpeedBenchConfig
from wholeslide.bench.pipelines.case import MEANT, PIPELINES, SpeedCase
from wholeslide.bench.pyramid import texture_tiles, write_pyramid
from wholeslide.bench.result import Result, Row
from wholeslide.geometry import Size

_log = logging.getLogger(__name__)

#: What a row does not repeat: how it was reached is in the command.
_HIDDEN = ("path", "seed")


def bench_speed(
    config: SpeedBenchConfig, result: Result | None = None, *, on_row: Callable[[Row], None] | None = None
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
    cases = list(combinations(config))
    patterns = texture_tiles(config.texture, seed=config.seed)
    result = result or Result()
    result.begin()
    with tempfile.TemporaryDirectory(prefix="wholeslide-bench-") as folder:
        slide = Path(folder) / "slide.svs"
        for (size, fraction), group in itertools.groupby(cases[len(result.rows) :], key=_slide_of):
            write_pyramid(slide, size, patterns, seed=config.seed, tissue_fraction=fraction)
            for values in group:
                row = _measured(SpeedCase(path=str(slide), **values))
                result.add(row)
                if on_row is not None:
                    on_row(row)
    result.finish()
    return result


def _slide_of(values: dict[str, Any]) -> tuple[Size, float]:
    return Size(values["width"], values["height"]), values["tissue_fraction"]


def combinations(config: SpeedBenchConfig) -> Iterable[dict[str, Any]]:
    """What each row is asked."""
    for size, fraction, pipeline in itertools.product(
        sizes(config.sizes),
        fractions(config.tissue_fractions),
        choices("pipelines", config.pipelines, PIPELINES),
    ):
        for dtype, first_stride in _ways(config, pipeline):
            yield {
                "width": size.width,
                "height": size.height,
                "tissue_fraction": fraction,
                "pipeline": pipeline,
                "dtype": dtype,
                "first_stride": first_stride,
                "stages": config.stages,
                "backbone": config.backbone,
                "repeats": config.repeats,
                "seed": config.seed,
            }


def _ways(config: SpeedBenchConfig, pipeline: str) -> list[tuple[str, int]]:
    """The arithmetic and the first stride of each row of a pipeline."""
    dtypes = choices("dtype", config.dtype, ("bf16", "fp32")) if pipeline != "local-int8" else ["int8"]
    strides = numbers("first_stride", config.first_stride)
    return [MEANT[pipeline]] if config.rows == "meant" else list(itertools.product(dtypes, strides))


def _measured(case: SpeedCase) -> dict[str, Any]:
    """The row of one case, from a process of its own; GABMIL has no stages."""
    facts = {key: value for key, value in asdict(case).items() if key not in _HIDDEN}
    facts["stages"] = case.stages if case.pipeline.startswith("local") else None
    row = measured_row("wholeslide.bench.speed_row", asdict(case), facts)
    if not row.get("measured", True):
        _log.warning(
            "%s %s %dx%d could not be measured: %s", case.pipeline, case.dtype, case.width, case.height, row["reason"]
        )
    return row
