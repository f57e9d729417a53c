"""``bench memory``: peak memory and time of one training step, one process a row."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wholeslide.bench.children import measured_row
from wholeslide.bench.choices import choices, fractions, numbers, sizes
from wholeslide.bench.config import SMALLEST, MemoryBenchConfig
from wholeslide.bench.result import Result, Row
from wholeslide.bench.texture import write_texture
from wholeslide.geometry import Size
from wholeslide.streaming.disk_store import folder_for_features
from wholeslide.streaming.planner import parse_memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """One row: a step on a ``width`` by ``height`` slide at ``path``, of which ``tissue_fraction`` is not white."""

    path: str
    width: int
    height: int
    tissue_fraction: float
    crop: bool
    method: str
    stages: int
    mode: str
    store: str
    store_dir: str | None
    backbone: str
    dtype: str
    rfr: bool
    memory: str
    over_baseline_bytes: int | None
    seed: int


#: What a row does not repeat: how it was reached is in the command.
_HIDDEN = ("path", "store_dir", "memory", "over_baseline_bytes", "seed")


def bench_memory(
    config: MemoryBenchConfig, result: Result | None = None, *, on_row: Callable[[Row], None] | None = None
) -> Result:
    """Measure every combination that ``config`` names.

    Args:
        config: the combinations.
        result: gets the rows; rows that it has of a call that was cut off are not measured again.
        on_row: is given each row that was measured.

    Returns:
        The result, with the GEMM rate of its first call. A row that could not be measured says ``"measured": false`` and why,
        and whether a user can mend it.

    Raises:
        ConfigError: a choice is not among those that exist.
        RunError: the disk is full.
    """
    combinations = list(_combinations(config))
    result = result or Result()
    result.begin()
    with tempfile.TemporaryDirectory(prefix="wholeslide-bench-") as folder:
        for (size, fraction), group in itertools.groupby(combinations[len(result.rows) :], key=_slide_of):
            slide = Path(folder) / f"{size}-{fraction}.tif"
            write_texture(slide, size, seed=config.seed, tissue_fraction=fraction)
            for values in group:
                row = _measured(MemoryCase(path=str(slide), **values), result.environment["gemm_gflops"])
                result.add(row)
                if on_row is not None:
                    on_row(row)
            slide.unlink()
    result.finish()
    return result


def _slide_of(values: dict[str, Any]) -> tuple[Size, float]:
    return Size(values["width"], values["height"]), values["tissue_fraction"]


def _combinations(config: MemoryBenchConfig) -> Iterable[dict[str, Any]]:
    slides = itertools.product(sizes(config.sizes), fractions(config.tissue_fractions))
    methods = choices("methods", config.methods, ("local", "end-to-end"))
    modes = choices("modes", config.modes, ("streamed", "whole"))
    stores = choices("stores", config.stores, ("host", "device", "disk"))
    networks = [("local", k) for k in numbers("stages", config.stages) if "local" in methods]
    networks += [("end-to-end", 1)] * ("end-to-end" in methods)
    over_baseline_bytes = None
    if config.over_baseline is not None:
        over_baseline_bytes = parse_memory(config.over_baseline, option="--over-baseline")
    elif config.memory != SMALLEST:
        parse_memory(config.memory)
    folder = str(folder_for_features(config.store_dir)) if "disk" in stores else None
    for (size, fraction), (method, stages), mode, store in itertools.product(slides, networks, modes, stores):
        if mode == "whole" and store != stores[0]:
            continue  # the whole graph has no store
        yield {
            "width": size.width,
            "height": size.height,
            "tissue_fraction": fraction,
            "crop": config.crop == "on",
            "method": method,
            "stages": stages,
            "mode": mode,
            "store": store if mode == "streamed" else "none",
            "store_dir": folder,
            "backbone": config.backbone,
            "dtype": config.dtype,
            "rfr": config.rfr == "on",
            "memory": config.memory,
            "over_baseline_bytes": over_baseline_bytes,
            "seed": config.seed,
        }


def _measured(case: MemoryCase, gemm_gflops: dict[str, float]) -> dict[str, Any]:
    """The row of one case, from a process of its own."""
    facts = {key: value for key, value in asdict(case).items() if key not in _HIDDEN}
    row = measured_row("wholeslide.bench.memory_row", asdict(case), facts)
    if row.get("measured", True):
        reachable = 1e9 * gemm_gflops[row["dtype"]] * row["seconds"]
        shares = {f"{kind}_gemm_fraction": round(row[f"{kind}_flops"] / reachable, 4) for kind in ("dense", "computed")}
        return {**row, **shares}
    _log.warning(
        "%s %s %sx%s could not be measured: %s", case.method, case.mode, case.width, case.height, row["reason"]
    )
    return row
