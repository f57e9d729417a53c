"""Slides that were never seen before."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wholeslide.errors import ConfigError, Problem, WholeslideError
from wholeslide.predict.calibration import calibration_of
from wholeslide.predict.engine import Precision, device_of, open_run, plan_for, prefetch_bytes, trained_engine
from wholeslide.predict.inputs import file_bytes, find_inputs, shares
from wholeslide.predict.output import MadeWith, PredictionOutput, row_writer
from wholeslide.predict.ranks import Ranks, device_of_rank, start_ranks
from wholeslide.predict.table import Row, columns_of
from wholeslide.slides.config import Decoders, SlideConfig
from wholeslide.slides.lock import alone_on
from wholeslide.streaming.plan import Plan
from wholeslide.train.inference import iterate_predictions
from wholeslide.train.learner import Learner
from wholeslide.train.progress import memory_bytes, progress_bar, slide_note
from wholeslide.train.run import Run
from wholeslide.train.survey import scale_oddities, working_scales
from wholeslide.train.views import Entry, entries

logger = logging.getLogger(__name__)

OnRow = Callable[[Row, Sequence[str], tuple[Problem, ...]], None]


@dataclass(frozen=True)
class PredictResult:
    """What `predict` found, in all the processes that took part.

    ``rows`` has the columns ``file, slide, patient, prediction, prob_<class>…, error``, a row a slide of this call, in the
    order of the inputs (what is not there first); a slide that could not be read has only its names and its ``error``.
    ``errors`` are those slides' problems. ``skipped`` counts the slides that had a prediction before. ``rank`` is this
    process's: the one of rank 0 tells the user.
    """

    rows: pd.DataFrame
    errors: tuple[Problem, ...]
    skipped: int = 0
    rank: int = 0

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of the slides that could not be read."""
        return self.rows[self.rows["error"] != ""]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What `predict` was asked for, see there."""

    run_dir: Path
    inputs: tuple[Path, ...]
    out: Path | None
    slides: Path | None
    mpp_override: float | None
    decoders: Decoders | None
    memory: str | None
    precision: Precision | None
    compiled: bool
    resume: bool

    def __post_init__(self) -> None:
        if self.compiled and self.precision == "int8":
            what, remedy = "8-bit stages are not compiled: their kernels are made already", "leave one of the two out"
            raise ConfigError.single(what, where="--compile --precision int8", remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What there is to do. ``asked`` are the slides in the order of the inputs, by the names that they have in the table.

    Slides are told by their positions in ``asked``: ``missing`` are not there, ``shares`` are to be predicted, by rank; the
    others are done. ``checkpoint`` is the hash of the one that all processes predict with.
    """

    run: Run
    slide_config: SlideConfig
    plan: Plan | None
    asked: pd.DataFrame
    missing: dict[int, tuple[Problem, ...]]
    checkpoint: str
    shares: list[list[int]]

    @property
    def columns(self) -> tuple[str, ...]:
        return columns_of(self.run.classes)


@dataclass(frozen=True)
class _Found:
    """A slide's row, its ``position`` in the inputs, its problems, and a note for the progress bar."""

    position: int
    row: Row
    problems: tuple[Problem, ...] = ()
    note: str = ""


def predict(
    run_dir: Path,
    inputs: Sequence[Path],
    *,
    out: Path | None = None,
    slides: Path | None = None,
    mpp_override: float | None = None,
    decoders: Decoders | None = None,
    memory: str | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    resume: bool = False,
    on_row: OnRow | None = None,
    quiet: bool = True,
) -> PredictResult:
    """Classify slides with the best checkpoint of a run, read as the run's own slides were.

    Several processes share the slides where ``devices`` or ``nodes`` say so, or ``torchrun`` or ``srun`` started several.
    Those that nobody started begin by running this script again.

    Args:
        run_dir: The run.
        inputs: Slides, folders that are searched for slides, and manifests without need of labels.
        out: CSV that gets each row as soon as it is known; in the end they are in the order of the inputs. Several processes
            keep a file each in ``<out>.rows`` until then. ``<out>.made-with.json`` tells what it was made with.
        slides: Folder of the slides that manifests name; left out: each manifest's own folder.
        mpp_override: Microns per stored pixel, for files whose scale is missing or wrong.
        decoders: Where files are decoded, as `SlideConfig` has it; left out: as in training.
        memory: Most memory that a process may use, as ``"8GiB"``; left out: the run's own plan.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``, whose ranges are found on training slides; left out: the run's own.
        compiled: Whether torch compiles the stages first, which needs a compiler and takes a minute or more.
        devices: Processes on this machine, each with a device of its own; left out: one, or as many as were started.
        nodes: Machines; left out: likewise.
        resume: Go on with ``out``: predictions are kept, errors tried again. Slides are told apart by their paths.
        on_row: Is given each row of this process, the table's columns and the row's problems.
        quiet: No progress bar.

    Raises:
        RunError: no such run or checkpoint; ``out`` exists, is full, being written, or was not made with the same; another
            process has ended too early.
        CohortError: a manifest that cannot be used; nothing to predict.
        ConfigError: ``mpp_override`` is no scale; nothing fits into ``memory``; several processes, and no ``out``; 8-bit stages
            that are to be compiled, or no way to compile; fewer devices than processes, or other numbers than were started.
        FailedElsewhereError: the process of rank 0 raises one of these.
    """
    request = _Request(
        run_dir=run_dir,
        inputs=tuple(inputs),
        out=out,
        slides=slides,
        mpp_override=mpp_override,
        decoders=decoders,
        memory=memory,
        precision=precision,
        compiled=compiled,
        resume=resume,
    )
    return _predict(request, start_ranks(devices, nodes), on_row, quiet=quiet)


def _predict(request: _Request, ranks: Ranks, on_row: OnRow | None, *, quiet: bool) -> PredictResult:
    """What each of the processes does; they meet wherever ``ranks`` is asked."""
    with ExitStack() as held:
        task, output = ranks.from_main(partial(_prepare, request, ranks.count, held))
        engine = ranks.together(partial(_engine, request, task, ranks))
        if output is not None:
            ranks.from_main(output.begin)
        share = ranks.together(partial(_predict_share, request, task, engine, ranks, on_row, quiet=quiet))
        found = sorted((one for part in ranks.gather(share) for one in part), key=lambda one: one.position)
        if output is not None:
            ranks.from_main(partial(output.finish, _all_rows(task, output, found)))
    return _result(task, found, ranks.rank)


def _prepare(request: _Request, processes: int, held: ExitStack) -> tuple[_Task, PredictionOutput | None]:
    """All that is read and checked before the first slide, in one process for all; ``held`` gets the output's lock."""
    if request.out is None and processes > 1:
        what, remedy = "the rows of several processes would mix on stdout", "name a file for them"
        raise ConfigError.single(what, where="--out", remedy=remedy)
    run = open_run(request.run_dir, request.decoders)
    slide_config, checkpoint = run.slide_config, run.checkpoints.pointer("best").sha256
    if request.mpp_override is not None:
        slide_config = dataclasses.replace(slide_config, mpp_override=request.mpp_override)
    found = find_inputs(request.inputs, slides=request.slides)
    slides = entries(found.table)
    _warn_of_scales(slides, slide_config)
    asked, done, output = found.all, set[str](), None
    if request.out is not None:
        held.enter_context(alone_on(request.out))
        made_with = MadeWith.of(
            checkpoint,
            slide_config,
            precision=request.precision,
            compiled=request.compiled,
            calibration=_ranges(run, request),
        )
        output = PredictionOutput.open(request.out, columns_of(run.classes), made_with, resume=request.resume)
        asked, done = output.named(asked), set(output.done)
    lacking = [position for position, file in enumerate(asked["file"]) if file not in done]
    missing = {position: found.missing[position][1].problems for position in lacking if position < len(found.missing)}
    todo = [position for position in lacking if position not in missing]
    plan = run.plan
    if todo:
        # For all the slides, also those that are done, so that a resumed run computes as one that was not interrupted.
        device = device_of(run.config.accelerator)
        plan = plan_for(run, slides, slide_config, device, memory=request.memory, precision=request.precision)
        if plan is None and request.compiled:
            what, remedy = f"method {run.config.method} has no stages to compile", "leave it out"
            raise ConfigError.single(what, where="--compile", remedy=remedy)
    dealt = shares([file_bytes(Path(asked["path"][position])) for position in todo], processes)
    task = _Task(
        run=run,
        slide_config=slide_config,
        plan=plan,
        asked=asked,
        missing=missing,
        checkpoint=checkpoint,
        shares=[[todo[index] for index in share] for share in dealt],
    )
    return task, output


def _ranges(run: Run, request: _Request) -> str | None:
    """The hash of the 8-bit ranges, where there are any; they are kept from here on, for all processes."""
    return calibration_of(run).sha256 if request.precision == "int8" and run.plan is not None else None


def _engine(request: _Request, task: _Task, ranks: Ranks) -> Learner[Any] | None:
    """This process's engine, if it has slides to predict."""
    if not task.shares[ranks.rank]:
        return None
    device = device_of_rank(device_of(task.run.config.accelerator), ranks)
    return trained_engine(
        task.run,
        task.plan,
        device,
        integers=request.precision == "int8",
        compiled=request.compiled,
        checkpoint=task.checkpoint,
    )


def _predict_share(
    request: _Request,
    task: _Task,
    engine: Learner[Any] | None,
    ranks: Ranks,
    on_row: OnRow | None,
    *,
    quiet: bool,
) -> list[_Found]:
    """Predict this process's slides, and keep their rows."""
    count = len(task.shares[ranks.rank]) + (len(task.missing) if ranks.is_main else 0)
    name = "predict" if ranks.count == 1 else f"predict, rank 0 of {ranks.count}"
    found: list[_Found] = []
    with ExitStack() as held:
        writer = None
        if request.out is not None:
            place = row_writer(request.out, task.columns, rank=ranks.rank, processes=ranks.count)
            writer = held.enter_context(place)
        progress = held.enter_context(progress_bar(name, count, quiet=quiet or not ranks.is_main))

        def keep(one: _Found) -> None:
            found.append(one)
            if writer is not None:
                writer.add(one.row)
            if on_row is not None:
                on_row(one.row, task.columns, one.problems)
            progress.advance(one.note)

        _find(request, task, engine, ranks.rank, keep)
    return found


def _warn_of_scales(slides: Sequence[Entry], config: SlideConfig) -> None:
    """Where pixels are taken as they are stored, slides may differ in scale; else all are read at one."""
    if config.target_mpp is None:
        remedy = "only slides of the scale that was trained on are judged as in training"
        for oddity in scale_oddities(working_scales(slides, config), remedy=remedy):
            logger.warning("%s", oddity)


def _find(
    request: _Request, task: _Task, engine: Learner[Any] | None, rank: int, keep: Callable[[_Found], None]
) -> None:
    """Tell of each slide of a share as soon as it is known, in order; of what is missing, rank 0 tells first."""
    asked, run = task.asked, task.run
    for position, problems in task.missing.items() if rank == 0 else ():
        keep(_Found(position, {"file": asked["file"][position], "error": _one_line(problems)}, problems))
    if engine is None:
        return
    slides = asked.iloc[task.shares[rank]]
    position_of = dict(zip(entries(slides), task.shares[rank], strict=True))

    def note(entry: Entry, error: WholeslideError) -> None:
        keep(_Found(position_of[entry], _names(entry) | {"error": _one_line(error.problems)}, error.problems))

    predictions = iterate_predictions(
        engine,
        slides,
        run.source_of_others(engine.network, task.slide_config),
        on_error=note,
        classifiers=[engine.network.depth],
        prefetch_bytes=prefetch_bytes(run, engine, request.memory),
    )
    for prediction in predictions:
        final = prediction.probabilities[-1]
        row: dict[str, object] = _names(prediction.entry)
        row["prediction"] = run.classes[int(np.argmax(final))]
        row |= {f"prob_{name}": float(value) for name, value in zip(run.classes, final, strict=True)}
        used = slide_note(prediction.seconds, memory_bytes(engine.device))
        keep(_Found(position_of[prediction.entry], row | {"error": ""}, note=used))


def _result(task: _Task, found: Sequence[_Found], rank: int) -> PredictResult:
    rows = pd.DataFrame([one.row for one in found], columns=list(task.columns))
    problems = tuple(problem for one in found for problem in one.problems)
    return PredictResult(rows, problems, len(task.asked) - len(found), rank)


def _all_rows(task: _Task, output: PredictionOutput, found: Sequence[_Found]) -> list[Row]:
    """A row for each slide that was asked for, in order: what was found now, and what was known before."""
    known, rows = output.done, {one.position: one.row for one in found}
    return [rows[position] if position in rows else known[file] for position, file in enumerate(task.asked["file"])]


def _names(entry: Entry) -> dict[str, object]:
    return {"file": entry.file, "slide": entry.slide, "patient": entry.patient}


def _one_line(problems: Sequence[Problem]) -> str:
    return "; ".join(" ".join(str(problem).split()) for problem in problems)
