"""``wholeslide report``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_problem
from wholeslide.cli.output import write
from wholeslide.errors import ConfigError, WholeslideError, too_small

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Which run is reported on, and with which pictures.

    Args:
        run: The run directory.
        split: Which of its scores are shown: a split, or the name of another cohort that it was scored on.
        pictures: How many slides are explained for the page, those with the largest errors first.
        slides: Folder of the run's slides, left out: where they were in training.
        pixels: Folder of the slides that files of features were made of, where the run was trained on such.
        out: The page, left out: report.html in the run.
        quiet: No progress bar.
    """

    run: Path
    split: str = "test"
    pictures: int = 24
    slides: Path | None = None
    pixels: Path | None = None
    out: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if problems := too_small(self, {"pictures": 0}):
            raise ConfigError(problems)


def run(arguments: ReportArguments) -> int:
    """Draw the page; 2 where a slide could not be shown."""
    from wholeslide.report import report

    found = report(
        arguments.run,
        split=arguments.split,
        pictures=arguments.pictures,
        slides=arguments.slides,
        pixels=arguments.pixels,
        out=arguments.out,
        quiet=arguments.quiet,
    )
    for problem in found.problems:
        write_problem(problem)
    write(f"Open {found.path} in a browser.")
    return MENDABLE if found.problems else 0


def draw_after(run_dir: Path, *, split: str = "test", pictures: int = 0) -> None:
    """Draw the page at the end of another command, which it must not fail."""
    from wholeslide.report import report

    try:
        report(run_dir, split=split, pictures=pictures)
    except WholeslideError as error:
        logger.warning("no report: %s; `wholeslide report %s` draws it anew", error, run_dir)


COMMAND = Command(
    name="report",
    summary="Draw the report of a run: a page with curves, scores, slides and facts.",
    arguments=ReportArguments,
    positionals=("run",),
    run=run,
    example="wholeslide report runs/first",
)
