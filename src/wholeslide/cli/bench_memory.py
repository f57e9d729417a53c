"""``wholeslide bench memory``."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholeslide.bench.config import MemoryBenchConfig
from wholeslide.cli.command import Command
from wholeslide.cli.failures import UNEXPECTED, write_line
from wholeslide.cli.output import format_bytes, print_table, write


@dataclass(frozen=True, kw_only=True)
class BenchMemoryArguments:
    """What is measured, and where the result goes.

    Args:
        out: The JSON file that is written.
    """

    out: Path
    bench: MemoryBenchConfig


def run(arguments: BenchMemoryArguments) -> int:
    """Measure, show, and write; 1 where nothing could be measured."""
    from wholeslide.bench.memory import bench_memory
    from wholeslide.train.checkpoint import disk_errors, write_atomically

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    found = bench_memory(arguments.bench, on_row=_report)
    content = {"environment": found["environment"], "command": command_line(arguments), "rows": found["rows"]}
    with disk_errors(arguments.out):
        write_atomically(arguments.out, (json.dumps(content, indent=2) + "\n").encode())
    _show(found["rows"])
    write(f"Written to {arguments.out}")
    return 0 if any(row.get("measured", True) for row in found["rows"]) else UNEXPECTED


def command_line(arguments: BenchMemoryArguments) -> str:
    """The command with every option spelled out, so that it stays the same whatever the defaults become."""
    words = ["wholeslide", "bench", "memory"]
    for field in dataclasses.fields(arguments.bench):
        words += ["--" + field.name.replace("_", "-"), str(getattr(arguments.bench, field.name))]
    return shlex.join([*words, "--out", str(arguments.out)])


def _report(row: dict[str, Any]) -> None:
    """Measurements take minutes: say each as it comes. What could not be measured has been warned of."""
    if row.get("measured", True):
        case = f"{row['method']} {row['mode']} K={row['stages']} {row['store']} {row['width']}x{row['height']}"
        write_line(f"{case}: {_over_baseline(row)} over the baseline, {row['seconds']:.1f} s")


def _over_baseline(row: dict[str, Any]) -> str:
    return format_bytes(row["peak_bytes"] - row["baseline_bytes"])


def _show(rows: list[dict[str, Any]]) -> None:
    shown = [
        [
            row["method"],
            row["stages"],
            row["mode"],
            row["store"],
            row["dtype"],
            f"{row['width']}x{row['height']}",
            format_bytes(row["peak_bytes"]),
            _over_baseline(row),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
        if row.get("measured", True)
    ]
    columns = ["method", "K", "mode", "store", "dtype", "size (px)", "peak", "over baseline", "seconds"]
    print_table(columns, shown, title="One training step")


COMMAND = Command(
    name="bench memory",
    summary="Measure the peak memory and the time of one training step.",
    arguments=BenchMemoryArguments,
    run=run,
    example="wholeslide bench memory --sizes 8698x7496 --stages 8 --out memory.json",
)
