"""``wholeslide bench io``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholeslide.bench.config import IoBenchConfig
from wholeslide.cli.bench_output import command_line, status_of
from wholeslide.cli.command import Command
from wholeslide.cli.failures import write_line
from wholeslide.cli.output import print_table, write


@dataclass(frozen=True, kw_only=True)
class BenchIoArguments:
    """What is measured, and where the result goes.

    Args:
        out: The JSON file that is written, row by row; the same command goes on with one that was cut off.
    """

    out: Path
    bench: IoBenchConfig


def run(arguments: BenchIoArguments) -> int:
    """Measure, show, and write; 2 where nothing could be measured and the user can mend that, else 1."""
    from wholeslide.bench.io import bench_io
    from wholeslide.bench.result import Result

    result = Result(arguments.out, command_line(COMMAND.name, arguments.bench, out=arguments.out))
    rows = bench_io(arguments.bench, result, on_row=_report).rows
    _show([row for row in rows if row.get("measured", True)])
    write(f"Written to {arguments.out}")
    return status_of(rows)


def _report(row: dict[str, Any]) -> None:
    """Say each row as it comes. What could not be measured has been warned of."""
    if row.get("measured", True):
        case = f"{row['reader']} {row['format']} {row['width']}x{row['height']} on {row['threads']}"
        write_line(f"{case}: {row['megapixels_per_second']:.1f} Mpx/s, {row['seconds']:.1f} s")


def _show(rows: list[dict[str, Any]]) -> None:
    shown = [
        [
            row["reader"],
            row["format"],
            f"{row['width']}x{row['height']}",
            f"{row['mpp']:g}",
            row["threads"],
            f"{row['megapixels_per_second']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['open_seconds']:.2f}",
        ]
        for row in rows
    ]
    columns = ["reader", "format", "size (px)", "mpp", "threads", "megapixels a second", "seconds", "opening"]
    print_table(columns, shown, title="Working pixels read from files that lie in memory")


COMMAND = Command(
    name="bench io",
    summary="Measure how fast slides are read, by our reader and by usual ones.",
    arguments=BenchIoArguments,
    run=run,
    example="wholeslide bench io --texture slide.svs --out io.json",
)
