"""``wholeslide predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_problem
from wholeslide.cli.output import write, write_csv_line
from wholeslide.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """What is predicted, and by which run.

    Args:
        run: The run directory.
        inputs: Slides, folders that are searched for slides, and manifests (CSV, no labels needed).
        out: CSV with a row a slide, written as each is known, and beside it a file for --resume that says what it was
            made with; left out: the rows go to stdout.
        slides: Folder of the slides that a manifest names; left out: the manifest's own folder.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        memory: Most memory to use, as 8GiB; left out: as in training.
        devices: Number of devices.
        resume: Go on with the file in out: slides that it has are skipped, its errors are tried again. Refused where it
            was made with another checkpoint or other options.
        quiet: No progress bar.
    """

    run: Path
    inputs: list[Path]
    out: Path | None = None
    slides: Path | None = None
    mpp_override: float | None = None
    memory: str | None = None
    devices: int = 1
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.devices != 1:
            remedy = "leave it at 1, and run one `wholeslide predict` a device on a part of the slides"
            problems.append(Problem(f"predicting on {self.devices} devices is not supported", "--devices", remedy))
        if self.resume and self.out is None:
            problems.append(Problem("nothing to resume", "--resume", "name the file to go on with by --out"))
        if problems:
            raise ConfigError(problems)


def run(arguments: PredictArguments) -> int:
    """Predict; 2 where a slide could not be read."""
    from wholeslide.predict import predict

    result = predict(
        arguments.run,
        arguments.inputs,
        out=arguments.out,
        slides=arguments.slides,
        mpp_override=arguments.mpp_override,
        memory=arguments.memory,
        resume=arguments.resume,
        on_row=_Rows(to_stdout=arguments.out is None).show,
        quiet=arguments.quiet,
    )
    if arguments.out is not None:
        good, failed = len(result.rows) - len(result.failed), len(result.failed)
        before = f", {result.skipped} before" if result.skipped else ""
        write(f"{good} slides predicted{before}, {failed} could not be read: {arguments.out}")
    return MENDABLE if result.errors else 0


class _Rows:
    """Shows rows as they come: on stdout where there is no file, their problems on stderr."""

    def __init__(self, *, to_stdout: bool) -> None:
        self._to_stdout = to_stdout
        self._begun = False

    def show(self, row: Mapping[str, object], columns: Sequence[str], problems: tuple[Problem, ...]) -> None:
        for problem in problems:
            write_problem(problem)
        if not self._to_stdout:
            return
        if not self._begun:
            write_csv_line(columns)
            self._begun = True
        write_csv_line([row.get(name, "") for name in columns])


COMMAND = Command(
    name="predict",
    summary="Classify slides that were never seen before.",
    arguments=PredictArguments,
    positionals=("run", "inputs"),
    run=run,
    example="wholeslide predict runs/first new-slides/ --out predictions.csv",
)
