"""``wholeslide train``."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.cli.command import Command
from wholeslide.cli.output import write
from wholeslide.cli.report import draw_after
from wholeslide.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What is trained, on what, and how.

    Args:
        dry_run: Read the cohort, print what would happen, how long it takes, how much memory and disk, and stop.
    """

    train: TrainConfig
    dry_run: bool = False


def run(arguments: TrainArguments) -> int:
    """Train, or say what training would do."""
    from wholeslide.allocator import fix_thresholds
    from wholeslide.train.loop import dry_run, train

    fix_thresholds()
    if arguments.dry_run:
        for line in dry_run(arguments.train):
            write(line)
        return 0
    finished = train(arguments.train)
    draw_after(finished.path)
    write(f"The run is in {finished.path}. Next: wholeslide evaluate {finished.path}")
    return 0


COMMAND = Command(
    name="train",
    summary="Train a classifier on whole slides.",
    arguments=TrainArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide train labels.csv --slides slides/ --out runs/first",
)
