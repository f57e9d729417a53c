"""A trained run, ready to predict on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from wholeslide.errors import ConfigError, Problem, RunError, WholeslideError
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork
from wholeslide.predict.calibration import calibration_of
from wholeslide.slides.config import Decoders, SlideConfig
from wholeslide.slides.opening import open_slide
from wholeslide.slides.scale import resolve_l0_mpp, working_sampling
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import NotEnoughMemoryError, gib, make_plan
from wholeslide.train.learner import Learner
from wholeslide.train.run import Run
from wholeslide.train.setup import prefetch_limit
from wholeslide.train.views import Entry

Precision = Literal["fp32", "bf16", "int8"]

USUAL = Size(10_000, 10_000)
"""What is planned for where no slide's size can be told."""


def open_run(path: Path, decoders: Decoders | None) -> Run:
    """A run that was made before; its slides are decoded as ``decoders`` says, if given, which changes no pixel.

    Raises:
        RunError: there is none, or it is damaged.
    """
    run = Run.open(path)
    return run if decoders is None else replace(run, config=replace(run.config, decoders=decoders))


def trained_engine(
    run: Run,
    plan: Plan | None,
    device: torch.device,
    *,
    integers: bool = False,
    compiled: bool = False,
    checkpoint: str | None = None,
) -> Learner[Any]:
    """The best checkpoint of a run, with a plan that `plan_for` made.

    Args:
        run: the run.
        plan: tile sizes and arithmetic, where the run's method has a plan.
        device: where tiles are computed.
        integers: whether stages multiply 8-bit integers, with the ranges that `calibration_of` gives.
        compiled: whether stages are compiled by torch, unless they multiply integers.
        checkpoint: the hash that the best checkpoint has to have, if any.

    Raises:
        RunError: there is no checkpoint, it is damaged, or another one by now; no ranges can be found.
        ConfigError: the device has no such arithmetic; torch cannot compile for it.
    """
    folder = run.config.store_dir
    if folder is not None and not folder.is_dir():
        folder = None  # another machine than the one it was trained on
    network, pointer = run.load_checkpoint("best")
    if checkpoint not in (None, pointer.sha256):
        raise RunError.single(
            "a better checkpoint has replaced the one that this began with",
            where=str(run.path),
            remedy="begin again when the training has ended, or with a copy of the run",
        )
    calibration = calibration_of(run, (network, pointer)) if integers else None
    engine = replace(run, plan=plan, config=replace(run.config, store_dir=folder)).learner(network.to(device), device)
    if isinstance(engine, StreamingEngine):
        if calibration is not None:
            engine.multiply_integers(calibration)
        elif compiled:
            engine.compile()
    return engine


def plan_for(
    run: Run,
    slides: Iterable[Entry],
    slide_config: SlideConfig,
    device: torch.device,
    *,
    memory: str | None = None,
    precision: Precision | None = None,
) -> Plan | None:
    """A plan for predictions: by default within the memory of the training and for its largest slide; none where none is made.

    Args:
        run: the run.
        slides: what is predicted; for a given ``memory`` the plan is for the largest of them.
        slide_config: how they are read.
        device: where tiles are computed.
        memory: in place of the run's.
        precision: in place of the run's; what is not 8-bit integers is then as in the run.

    Raises:
        RunError: there is no checkpoint, or it is damaged.
        ConfigError: nothing fits into ``memory``.
    """
    if run.plan is None:
        _refuse_plans(run, memory=memory, precision=precision)
        return None
    network = run.load_network("best").to(device)
    assert isinstance(network, LocalNetwork)
    # The run's own arithmetic down to its layout: the same rows whenever and wherever a prediction is gone on with.
    own = run.plan.execution if precision in (None, "int8", run.plan.execution.precision) else None
    arithmetic = run.plan.execution.precision if precision is None or precision == "int8" else precision
    config = StreamingConfig(memory=memory or run.config.memory, store=run.config.store, precision=arithmetic)
    file, largest = (
        ("the run's largest slide", run.plan.largest) if memory is None else largest_slide(slides, slide_config)
    )
    try:
        return make_plan(network, largest, config, device, training=False, execution=own)
    except NotEnoughMemoryError as error:
        needed = gib(error.needed_bytes)
        raise ConfigError.single(
            f"the largest slide, of {largest} px, needs {needed} of memory",
            where=f"{file}, --memory {config.memory}",
            remedy=f"give at least {needed}",
        ) from error


def _refuse_plans(run: Run, **options: str | None) -> None:
    """See that nothing is asked for that only streamed stages have.

    Raises:
        ConfigError: all that is.
    """
    problems = [
        Problem(f"method {run.config.method} computes as it was trained", f"--{name} {value}", "leave it out")
        for name, value in options.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)


def prefetch_bytes(run: Run, engine: Learner[Any], memory: str | None) -> int:
    """Most bytes of a slide that is read ahead, as in training: none where the memory of a CPU is bounded."""
    config = run.config if memory is None else replace(run.config, memory=memory)
    return prefetch_limit(config, engine.device)


def device_of(accelerator: str) -> torch.device:
    """The device of a run's ``--accelerator``; the CPU where the run's GPU is not there."""
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def largest_slide(slides: Iterable[Entry], config: SlideConfig) -> tuple[str, Size]:
    """The name and the size in working pixels of the largest slide, before it is cropped to its tissue, told by the headers alone.

    Slides that cannot be opened are passed over: they are reported when it is their turn.
    """
    sizes = [(slide.file, size) for slide in slides if (size := _whole_size(slide.path, config, slide.mpp)) is not None]
    return max(sizes, key=lambda named: named[1].area, default=("a slide of usual size", USUAL))


def _whole_size(path: Path, config: SlideConfig, mpp: float | None) -> Size | None:
    try:
        with closing(open_slide(path, fast=False, decoders=config.decoders)) as reader:
            return working_sampling(reader, config, resolve_l0_mpp(reader, config, mpp)).size
    except (WholeslideError, OSError):
        return None
