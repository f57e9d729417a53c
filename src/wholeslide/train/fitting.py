"""What fits into the memory: the plan of a run, how many stages are quickest, and what would help where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wholeslide.errors import ModelError, Problem
from wholeslide.geometry import Size
from wholeslide.model.network import LocalNetwork, build_network
from wholeslide.streaming.config import StreamingConfig
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import (
    NotEnoughMemoryError,
    execution_of,
    gib,
    least_memory,
    make_plan,
    memory_limit,
    process_bytes,
)
from wholeslide.train.config import GIB, TrainConfig
from wholeslide.train.tables import table_lines

STAGES = (1, 2, 4, 8)
"""The numbers of stages that are looked at; of ResNet34 those that the paper cuts."""


@dataclass(frozen=True)
class Largest:
    """The slide of a cohort with the largest area, in working pixels."""

    file: str
    size: Size


@dataclass(frozen=True)
class Candidate:
    """A number of stages, and what training with it would take.

    ``memory_bytes`` is the peak of the process; where that is too much, the least that any tiles take.
    """

    stages: int
    memory_bytes: int
    seconds_per_megapixel: float | None
    fits: bool


def choose_stages(
    config: TrainConfig, largest: Largest, device: torch.device
) -> tuple[TrainConfig, tuple[Candidate, ...]]:
    """The options with the number of stages that trains quickest within the memory, and all that were looked at.

    For the ``smallest`` memory it is the one that takes the least.

    Raises:
        NotEnoughMemoryError: none fits.
    """
    candidates = tuple(_candidate(config, stages, network, largest, device) for stages, network in _networks(config))
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        least = min(candidates, key=lambda candidate: candidate.memory_bytes)
        raise NotEnoughMemoryError(
            [
                Problem(
                    f"not enough memory for the largest slide, of {largest.size} px, at any number of stages",
                    _where(config, largest),
                    f"give at least {gib(least.memory_bytes)}, which does for --stages {least.stages}, or a coarser --mpp",
                )
            ],
            least.memory_bytes,
        )
    if config.memory == "smallest":
        chosen = min(fitting, key=lambda candidate: candidate.memory_bytes)
    else:
        chosen = min(fitting, key=lambda candidate: candidate.seconds_per_megapixel or 0.0)
    return replace(config, stages=chosen.stages), candidates


def candidate_lines(candidates: tuple[Candidate, ...], chosen: int, largest: Size) -> list[str]:
    """What was looked at for ``--stages auto``, as a table."""
    rows = []
    for candidate in candidates:
        seconds = candidate.seconds_per_megapixel
        rows.append(
            [
                str(candidate.stages),
                "-" if seconds is None else f"{seconds:.3g} s",
                "-" if seconds is None else f"{seconds * largest.area / 1e6:.3g} s",
                f"{candidate.memory_bytes / GIB:.2f} GiB",
                "yes" if candidate.fits else "no",
                "chosen" if candidate.stages == chosen else "",
            ]
        )
    columns = ["stages", "a megapixel", "the largest slide", "memory", "fits", ""]
    return [f"--stages auto chose {chosen} of these:", *table_lines(columns, rows)]


def plan_that_fits(config: TrainConfig, network: LocalNetwork, largest: Largest, device: torch.device) -> Plan:
    """The plan of a run.

    Raises:
        NotEnoughMemoryError: there is none; it names the slide, what it needs, and what else would do.
    """
    try:
        return make_plan(network, largest.size, config.streaming_config(), device)
    except NotEnoughMemoryError as error:
        needed_bytes = error.needed_bytes
    stages = f"{config.depth} stages" if config.depth > 1 else "one stage"
    remedies = [f"give at least {gib(needed_bytes)}", *_remedies(config, network, largest, device)]
    raise NotEnoughMemoryError(
        [
            Problem(
                f"the largest slide, of {largest.size} px, needs {gib(needed_bytes)} of memory at {stages}",
                _where(config, largest),
                ", or ".join(remedies),
            )
        ],
        needed_bytes,
    )


def _candidate(
    config: TrainConfig, stages: int, network: LocalNetwork, largest: Largest, device: torch.device
) -> Candidate:
    streaming = config.streaming_config()
    try:
        plan = make_plan(network, largest.size, streaming, device)
    except NotEnoughMemoryError as error:
        return Candidate(stages, error.needed_bytes, None, fits=False)
    memory_bytes = process_bytes(network, device, training=True) + plan.predicted_peak_bytes
    fits = memory_bytes <= memory_limit(streaming, device)
    return Candidate(stages, memory_bytes, plan.seconds_per_megapixel, fits)


def _networks(config: TrainConfig) -> Iterator[tuple[int, LocalNetwork]]:
    """The structure of the network at each number of stages that the backbone can be cut into."""
    for stages in STAGES:
        model = replace(config.model_config(), stages=stages)
        try:
            network = build_network(
                model, classes=2, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3, seed=0, pretrained=False
            )
        except ModelError:
            if stages == 1:
                raise
            return  # fewer blocks than stages
        yield stages, network


def _remedies(config: TrainConfig, network: LocalNetwork, largest: Largest, device: torch.device) -> Iterator[str]:
    """What would fit in place of what was asked for: the smallest number of stages, a store, tiles of any size."""
    streaming = config.streaming_config()
    limit_bytes = memory_limit(streaming, device)
    execution = execution_of(network, streaming, device)

    def fits(other: LocalNetwork, options: StreamingConfig) -> bool:
        return least_memory(other, largest.size, options, execution, device) <= limit_bytes

    for stages, other in _networks(config):
        if stages != config.depth and fits(other, streaming):
            yield f"--stages {stages}" if config.method == "local" else f"--method local-k{stages}"
            break
    if streaming.store in ("device", "host") and fits(network, replace(streaming, store="disk")):
        yield "--store disk"
    if streaming.tile is not None and fits(network, replace(streaming, tile=None)):
        yield "no --tile"


def _where(config: TrainConfig, largest: Largest) -> str:
    return f"{largest.file}, {f'--memory {config.memory}' if config.memory else 'all that this machine has'}"
