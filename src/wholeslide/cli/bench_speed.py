"""``wholeslide bench speed``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wholeslide.bench.config import SpeedBenchConfig
from wholeslide.cli.bench_output import check_picture, command_line, status_of, write_picture
from wholeslide.cli.command import Command
from wholeslide.cli.failures import write_line
from wholeslide.cli.output import format_bytes, print_table, write

if TYPE_CHECKING:
    from wholeslide.bench.speed_ratios import Ratio


@dataclass(frozen=True, kw_only=True)
class BenchSpeedArguments:
    """What is measured, and where the result goes.

    Args:
        out: The JSON file that is written, row by row; the same command goes on with one that was cut off.
        plot: A picture (PNG, SVG or PDF) of the seconds, and of the ratios beside the paper's.

    Raises:
        ConfigError: there is no way to draw.
    """

    out: Path
    plot: Path | None = None
    bench: SpeedBenchConfig

    def __post_init__(self) -> None:
        check_picture(self.plot)


def run(arguments: BenchSpeedArguments) -> int:
    """Measure, show, and write; 2 where nothing could be measured and the user can mend that, else 1."""
    from wholeslide.bench.result import Result
    from wholeslide.bench.speed import bench_speed
    from wholeslide.bench.speed_picture import draw_speed
    from wholeslide.bench.speed_ratios import ratios

    command = command_line(COMMAND.name, arguments.bench, out=arguments.out, plot=arguments.plot)
    rows = bench_speed(arguments.bench, Result(arguments.out, command), on_row=_report).rows
    measured = [row for row in rows if row.get("measured", True)]
    _show(measured)
    compared = ratios(measured)
    if compared:
        _show_ratios(compared)
    _show_paper(measured)
    write(f"Written to {arguments.out}")
    if arguments.plot is not None and measured:
        write_picture(arguments.plot, lambda path: draw_speed(measured, path))
    return status_of(rows)


def _report(row: dict[str, Any]) -> None:
    """Measurements take minutes: say each as it comes. What could not be measured has been warned of."""
    if row.get("measured", True):
        case = f"{row['pipeline']} {row['dtype']} first stride {row['first_stride']} {row['width']}x{row['height']}"
        write_line(f"{case}: {row['total_seconds']:.2f} s")


def _show(rows: Sequence[dict[str, Any]]) -> None:
    shown = [
        [
            row["pipeline"],
            row["dtype"],
            row["first_stride"],
            f"{row['width']}x{row['height']}",
            f"{row['tissue_fraction']:.0%}",
            *(f"{row[f'{part}_seconds']:.2f}" for part in ("read", "compute", "total")),
            f"{row['flops'] / 1e12:.2f}",
            f"{row['peak_fraction']:.0%}",
            format_bytes(row["peak_bytes"] - row["baseline_bytes"]),
        ]
        for row in rows
    ]
    columns = ["pipeline", "dtype", "first stride", "size (px)", "tissue", "reading alone (s)", "computing alone (s)"]
    columns += ["total (s)", "Tflop", "of the GEMM rate", "memory over baseline"]
    print_table(columns, shown, title="From a file to its prediction, on this CPU")


def _show_ratios(compared: Sequence[Ratio]) -> None:
    from wholeslide.bench.speed_ratios import EQUAL, EQUAL_IS, OURS_IS, THEIRS_IS

    shown = [
        [
            str(ratio.size),
            f"{ratio.tissue_fraction:.0%}",
            ratio.gabmil,
            ratio.local,
            "=" if ratio.kind == EQUAL else ratio.kind,
            *(f"{value:.2f}" for value in (ratio.total, ratio.read, ratio.compute, ratio.flops)),
            f"{ratio.paper_total:.1f}" if ratio.paper_total is not None else None,
        ]
        for ratio in compared
    ]
    columns = ["size (px)", "tissue", "time of", "over that of", "", "total", "reading", "computing", "arithmetic"]
    print_table([*columns, "paper's total (GPU)"], shown, title="How many times as long, on this CPU")
    for note in (OURS_IS, THEIRS_IS, EQUAL_IS):
        write(note)


def _show_paper(rows: Sequence[dict[str, Any]]) -> None:
    from wholeslide.bench.paper import SPEED_SOURCE, TABLE_3
    from wholeslide.geometry import Size

    sizes = dict.fromkeys(Size(row["width"], row["height"]) for row in rows)
    shown = [
        [str(size), *(f"{s:.1f}" for s in (found.tiling, found.features, found.total, found.local))]
        for size in sizes
        if (found := TABLE_3.get(size)) is not None
    ]
    if shown:
        columns = ["size (px)", "GABMIL: tiling (s)", "features (s)", "total (s)", "local (s)"]
        print_table(columns, shown, title=f"The paper's seconds, on a GPU ({SPEED_SOURCE})")


COMMAND = Command(
    name="bench speed",
    summary="Measure the time from a slide's file to its prediction, beside patch features with attention.",
    arguments=BenchSpeedArguments,
    run=run,
    example="wholeslide bench speed --sizes 8698x7496 --texture slide.svs --out speed.json",
)
