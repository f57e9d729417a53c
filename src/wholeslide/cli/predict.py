"""``wholeslide predict``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE, write_problem
from wholeslide.cli.output import write, write_csv_line
from wholeslide.errors import ConfigError, Problem, too_small
from wholeslide.slides.config import Decoders


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """What is predicted, and by which run.

    Args:
        run: The run directory.
        inputs: Slides, folders that are searched for slides, and manifests (CSV, no labels needed).
        out: CSV with a row a slide, added as each is known, and in the end in the order of the inputs; beside it a file
            for --resume that says what it was made with. Several processes keep their rows in OUT.rows until the end.
            Left out: the rows go to stdout.
        slides: Folder of the slides that a manifest names; left out: the manifest's own folder.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        decoders: Where files are decoded: in threads; in processes, so that a decoder that crashes on a damaged file costs
            that slide only; or auto, as for train. Left out: as in training.
        memory: Most memory that each process may use, as 8GiB: several on one machine take as many times that. Left out:
            as in training.
        precision: Arithmetic of the stages: fp32, bf16, or int8, which is twice as fast as bf16 on processors with 8-bit
            instructions; its ranges are found on training slides once, and kept in the run. Left out: as in training.
        compile: Let torch compile the stages first, which needs a C++ compiler and takes a minute or more: for thousands of slides.
        devices: Number of processes on this machine that share the slides, each with a GPU of its own where there are
            any; left out: 1, or as many as torchrun or srun have started.
        nodes: Number of machines, on each of which this is started, with the environment variables NODE_RANK (0, 1, ...),
            MASTER_ADDR and MASTER_PORT; left out: 1, or as many as torchrun or srun use.
        resume: Go on with the file in out: slides that it has are skipped, its errors are tried again, whatever the number
            of processes was and is. Refused where it was made with another checkpoint or other options.
        quiet: No progress bar.
    """

    run: Path
    inputs: list[Path]
    out: Path | None = None
    slides: Path | None = None
    mpp_override: float | None = None
    decoders: Decoders | None = None
    memory: str | None = None
    precision: Literal["fp32", "bf16", "int8"] | None = None
    compile: bool = False
    devices: int | None = None
    nodes: int | None = None
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        problems = too_small(self, {"devices": 1, "nodes": 1})
        if self.resume and self.out is None:
            problems.append(Problem("nothing to resume", "--resume", "name the file to go on with by --out"))
        if self.out is None and max(self.devices or 1, self.nodes or 1) > 1:
            what, remedy = "the rows of several processes would mix on stdout", "name a file for them"
            problems.append(Problem(what, "--out", remedy))
        if problems:
            raise ConfigError(problems)


def run(arguments: PredictArguments) -> int:
    """Predict; 2 where a slide could not be read, whichever of several processes met it: rank 0 tells for all.

    A process that did its part ends with 0: those who start processes end all of them where one fails.
    """
    from wholeslide.predict import FailedElsewhereError, predict

    try:
        result = predict(
            arguments.run,
            arguments.inputs,
            out=arguments.out,
            slides=arguments.slides,
            mpp_override=arguments.mpp_override,
            decoders=arguments.decoders,
            memory=arguments.memory,
            precision=arguments.precision,
            compiled=arguments.compile,
            devices=arguments.devices,
            nodes=arguments.nodes,
            resume=arguments.resume,
            on_row=_Rows(to_stdout=arguments.out is None).show,
            quiet=arguments.quiet,
        )
    except FailedElsewhereError:
        return 0
    if result.rank > 0:
        return 0
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
