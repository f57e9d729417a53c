"""``bench memory``: peak memory and time of one training step, one process a row."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wholeslide.bench.config import MemoryBenchConfig
from wholeslide.bench.environment import environment
from wholeslide.bench.texture import write_texture
from wholeslide.errors import ConfigError
from wholeslide.geometry import Size

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """One row: a step on a ``width`` by ``height`` slide at ``path``."""

    path: str
    width: int
    height: int
    method: str
    stages: int
    mode: str
    store: str
    backbone: str
    dtype: str
    rfr: bool
    memory: str
    seed: int


def bench_memory(
    config: MemoryBenchConfig, *, on_row: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Measure every combination that ``config`` names.

    Returns:
        ``environment``, with the GEMM rate of this run, and ``rows``. A row that could not be measured says
        ``"measured": false`` and why.

    Raises:
        ConfigError: a choice is not among those that exist.
    """
    combinations = list(_combinations(config))
    facts, rows = environment(), []
    with tempfile.TemporaryDirectory(prefix="wholeslide-bench-") as folder:
        for size, group in itertools.groupby(combinations, key=lambda case: Size(case["width"], case["height"])):
            slide = Path(folder) / f"{size}.tif"
            write_texture(slide, size, seed=config.seed)
            for values in group:
                row = _measured(MemoryCase(path=str(slide), **values))
                rows.append(row)
                if on_row is not None:
                    on_row(row)
            slide.unlink()
    return {"environment": facts, "rows": rows}


def _combinations(config: MemoryBenchConfig) -> Iterable[dict[str, Any]]:
    sizes = [Size.parse(text) for text in config.sizes.split(",")]
    methods = _choices("methods", config.methods, ("local", "end-to-end"))
    modes = _choices("modes", config.modes, ("streamed", "whole"))
    stores = _choices("stores", config.stores, ("host", "device", "disk"))
    networks = [("local", int(k)) for k in _choices("stages", config.stages, None) if "local" in methods]
    networks += [("end-to-end", 1)] * ("end-to-end" in methods)
    for size, (method, stages), mode, store in itertools.product(sizes, networks, modes, stores):
        if mode == "whole" and store != stores[0]:
            continue  # the whole graph has no store
        yield {
            "width": size.width,
            "height": size.height,
            "method": method,
            "stages": stages,
            "mode": mode,
            "store": store if mode == "streamed" else "none",
            "backbone": config.backbone,
            "dtype": config.dtype,
            "rfr": config.rfr == "on",
            "memory": config.memory,
            "seed": config.seed,
        }


def _choices(option: str, text: str, known: tuple[str, ...] | None) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if (not word.isdigit() or word == "0" if known is None else word not in known)]
    if wrong or not words:
        remedy = f"choose among {', '.join(known)}" if known else "give numbers of 1 or more"
        raise ConfigError.single("not a choice", where=f"--{option} {text}", remedy=f"{remedy}, separated by commas")
    return words


def _measured(case: MemoryCase) -> dict[str, Any]:
    """The row of one case, from a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "wholeslide.bench.memory_row"],
        input=json.dumps(asdict(case)),
        capture_output=True,
        text=True,
    )
    facts = {key: value for key, value in asdict(case).items() if key not in ("path", "seed", "memory")}
    facts["tissue_fraction"] = 1.0
    if finished.returncode == 0:
        return {**facts, **json.loads(finished.stdout.splitlines()[-1])}
    reason = finished.stderr.strip().splitlines()[-1] if finished.stderr.strip() else f"status {finished.returncode}"
    _log.warning("%s %sx%s could not be measured: %s", case.method, case.width, case.height, reason)
    return {**facts, "measured": False, "reason": reason}
