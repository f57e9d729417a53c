"""``wholeslide bench memory``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wholeslide.bench.config import MemoryBenchConfig
from wholeslide.cli.bench_output import check_picture, command_line, status_of, write_picture
from wholeslide.cli.command import Command
from wholeslide.cli.failures import write_line
from wholeslide.cli.output import format_bytes, print_table, write
from wholeslide.errors import ConfigError

if TYPE_CHECKING:
    from wholeslide.bench.comparison import Share


@dataclass(frozen=True, kw_only=True)
class BenchMemoryArguments:
    """What is measured, and where the result goes.

    Args:
        out: The JSON file that is written, row by row; the same command goes on with one that was cut off.
        plot: A picture (PNG, SVG or PDF) of the memory in percent of end to end, beside the paper's; end to end in one
            piece has to be among the --methods and --modes.

    Raises:
        ConfigError: there would be nothing to draw, or no way to.
    """

    out: Path
    plot: Path | None = None
    bench: MemoryBenchConfig

    def __post_init__(self) -> None:
        if self.plot is None:
            return
        check_picture(self.plot)
        if "end-to-end" not in self.bench.methods or "whole" not in self.bench.modes:
            raise ConfigError.single(
                "nothing to be in percent of",
                where=f"--plot {self.plot}",
                remedy="add --methods local,end-to-end --modes streamed,whole",
            )


def run(arguments: BenchMemoryArguments) -> int:
    """Measure, show, and write; 2 where nothing could be measured and the user can mend that, else 1."""
    from wholeslide.bench.comparison import shares_of_end_to_end
    from wholeslide.bench.memory import bench_memory
    from wholeslide.bench.result import Result

    command = command_line(COMMAND.name, arguments.bench, out=arguments.out, plot=arguments.plot)
    rows = bench_memory(arguments.bench, Result(arguments.out, command), on_row=_report).rows
    measured = [row for row in rows if row.get("measured", True)]
    _show(measured)
    shares = shares_of_end_to_end(rows)
    drawn = any(share.of_end_to_end is not None for share in shares)
    if drawn:
        _show_shares(shares)
    write(f"Written to {arguments.out}")
    if arguments.plot is not None and drawn:
        from wholeslide.bench.picture import draw_shares

        write_picture(arguments.plot, lambda path: draw_shares(shares, path))
    elif arguments.plot is not None:
        write_line("no picture: end to end in one piece ran at no size")
    return status_of(rows)


def _report(row: dict[str, Any]) -> None:
    """Measurements take minutes: say each as it comes. What could not be measured has been warned of."""
    if row.get("measured", True):
        case = f"{row['method']} {row['mode']} K={row['stages']} {row['store']} {row['width']}x{row['height']}"
        write_line(f"{case}: {_over_baseline(row)} over the baseline, {row['seconds']:.1f} s")


def _over_baseline(row: dict[str, Any]) -> str:
    return format_bytes(row["peak_bytes"] - row["baseline_bytes"])


def _show(rows: Sequence[dict[str, Any]]) -> None:
    shown = [
        [
            row["method"],
            row["stages"],
            row["mode"],
            row["store"],
            row["dtype"],
            f"{row['width']}x{row['height']}",
            f"{row['tissue_fraction']:.0%}",
            format_bytes(row["peak_bytes"]),
            _over_baseline(row),
            f"{row['predicted_error']:+.0%}" if row["predicted_error"] is not None else None,
            f"{row['seconds']:.1f}",
            *(f"{row[f'{kind}_flops'] / 1e12:.2f}" for kind in ("dense", "active", "computed")),
            *(f"{row[f'{kind}_gemm_fraction']:.0%}" for kind in ("dense", "computed")),
        ]
        for row in rows
    ]
    columns = ["method", "K", "mode", "store", "dtype", "size (px)", "tissue", "peak", "over baseline", "predicted"]
    columns += ["seconds", "dense Tflop", "active", "computed", "dense / GEMM rate", "computed / GEMM rate"]
    print_table(columns, shown, title="One training step")


def _show_shares(shares: Sequence[Share]) -> None:
    from wholeslide.bench.comparison import EXTRAPOLATED_IS, OURS_IS, THEIRS_IS

    shown = [
        [
            str(share.size),
            share.label,
            format_bytes(share.over_baseline_bytes) + "*" * (share.end_to_end and share.extrapolated),
            _percent(share.of_end_to_end, "*" * share.extrapolated),
            f"{share.paper_gigabytes:.2f} G" if share.paper_gigabytes is not None else None,
            _percent(share.paper_of_end_to_end),
        ]
        for share in shares
    ]
    columns = ["size (px)", "ours", "over baseline (CPU)", "of end to end", "paper (GPU)", "of its end to end"]
    print_table(columns, shown, title="Memory in percent of end to end in one piece")
    for note in (OURS_IS, THEIRS_IS, *([EXTRAPOLATED_IS] if any(share.extrapolated for share in shares) else [])):
        write(note)


def _percent(share: float | None, mark: str = "") -> str | None:
    return f"{share:.1%}{mark}" if share is not None else None


COMMAND = Command(
    name="bench memory",
    summary="Measure the peak memory and the time of one training step.",
    arguments=BenchMemoryArguments,
    run=run,
    example="wholeslide bench memory --sizes 8698x7496 --stages 8 --out memory.json",
)
