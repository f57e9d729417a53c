"""``wholeslide demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.output import write
from wholeslide.cli.report import draw_after

_PICTURES = 12
"""Slides that the report shows."""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """Where the demonstration goes.

    Args:
        out: Folder for its slides, its run and its results.
        seed: Seed of the made-up slides and of the training.
    """

    out: Path = Path("demo-out")
    seed: int = 0


def run(arguments: DemoArguments) -> int:
    """Make slides, train, evaluate, and say what was found."""
    from wholeslide.allocator import fix_thresholds
    from wholeslide.demo.run import demo

    fix_thresholds()
    found = demo(arguments.out, arguments.seed)
    draw_after(found.run_dir, pictures=_PICTURES)
    for line in found.lines():
        write(line)
    write(f"Its report: {found.run_dir / 'report.html'}. Its slides: wholeslide view {found.run_dir}")
    return 0


COMMAND = Command(
    name="demo",
    summary="Train on a made-up cohort and see every part work, in a few minutes.",
    arguments=DemoArguments,
    run=run,
    example="wholeslide demo --out demo-out --seed 0",
)
