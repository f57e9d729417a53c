"""The processes that share one prediction: how many there are, which one this is, and what they tell each other.

``torchrun`` and SLURM's ``srun`` start them; otherwise Lightning Fabric does, by running this command line again for each.
The one of rank 0 speaks for all: it reads the inputs, holds the output and ends with what happened anywhere.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from wholeslide.errors import ConfigError, Problem, RunError, WholeslideError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long one process waits for another, which may have much larger slides."""
LOOK_SECONDS = 0.1


class FailedElsewhereError(RunError):
    """Rank 0 raises and tells what went wrong; this process only has to end."""


class Ranks:
    """One of ``count`` processes, of ``rank`` 0 to ``count`` - 1, and ``local_rank`` among those of its machine."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.count = count
        self.local_rank = local_rank
        self._group: Any = dist.new_group(timeout=PATIENCE, backend="gloo") if count > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def from_main(self, work: Callable[[], T]) -> T:
        """What rank 0 makes, for every process.

        Raises:
            Exception: what ``work`` raised, on rank 0.
            FailedElsewhereError: elsewhere, then.
        """
        if self.count == 1:
            return work()
        made, error = _attempt(work) if self.is_main else (None, None)
        (value, failed), *_ = self.gather((made, error is not None))
        if error is not None:
            raise error
        if failed:
            raise FailedElsewhereError.single("it failed", where="rank 0", remedy="see what that process says")
        return made if self.is_main else value  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """What each process makes for itself, once all have made theirs.

        Raises:
            WholeslideError: on rank 0: all that the user can mend, of all processes.
            FailedElsewhereError: elsewhere, then.
            Exception: any other that ``work`` raised in this process.
        """
        if self.count == 1:
            return work()
        made, error = _attempt(work)
        if error is not None:
            logger.warning("rank %d does no more, and waits for the others: %s", self.rank, error)
        failures = [failure for failure in self.gather(_problems(error, self.rank)) if failure]
        if error is not None and not isinstance(error, WholeslideError):
            raise error
        if failures and self.is_main:
            raise RunError(dict.fromkeys(problem for failure in failures for problem in failure))
        if failures:
            raise FailedElsewhereError.single("it failed", where=f"rank {self.rank}", remedy="see what rank 0 says")
        return made  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, by rank, once all have given theirs.

        Raises:
            RunError: another process has ended before.
        """
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.count
        try:
            arrived = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
            assert arrived is not None
            while not arrived.is_completed():
                time.sleep(LOOK_SECONDS)  # where signals are heard; the waiting below hears none
            arrived.wait()
            dist.all_gather_object(found, value, group=self._group)
        except RuntimeError as error:
            raise RunError.single(
                "another process of this prediction has ended",
                where=f"noticed by rank {self.rank} of {self.count}",
                remedy="see what that process says; what is done is kept, and --resume goes on",
            ) from error
        return found


def start_ranks(devices: int | None, nodes: int | None) -> Ranks:
    """Join the processes that share a prediction, after starting them if nobody else has.

    Args:
        devices: Processes on each machine; left out: as many as were started from outside, or one.
        nodes: Machines; left out: likewise.

    Raises:
        ConfigError: other numbers were started from outside.
    """
    started = _started_outside()
    if started is None:
        started = _Started("nobody", devices or 1, nodes or 1)
    started.check(devices, nodes)
    return Ranks() if started.devices * started.nodes == 1 else _joined(started)


def _joined(started: _Started) -> Ranks:
    """Meet the other processes. Fabric only starts them and gives each its rank: they exchange messages, not tensors."""
    from lightning.fabric import Fabric  # takes seconds to import, and one process alone does not need it
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.fabric.strategies.ddp import DDPStrategy

    environments = {"nobody": LightningEnvironment, "torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment}
    strategy = DDPStrategy(cluster_environment=environments[started.by](), process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=started.devices, num_nodes=started.nodes, strategy=strategy)
    parent = os.getppid()
    with _warnings_only():
        fabric.launch()
    if fabric.local_rank > 0:
        _end_with(parent)
    return Ranks(fabric.global_rank, fabric.world_size, fabric.local_rank)


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """This process's own among a machine's devices of one kind.

    Raises:
        ConfigError: the machine has fewer than processes.
    """
    if device.type != "cuda" or ranks.count == 1:
        return device
    found = torch.cuda.device_count()
    if found == 1 and _started_outside() is not None:
        index = 0  # each process was given a device of its own
    elif ranks.local_rank < found:
        index = ranks.local_rank
    else:
        raise ConfigError.single(
            f"there are only {found} CUDA devices on this machine",
            where=f"--devices, rank {ranks.rank}",
            remedy="give as many processes as there are devices",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@dataclass(frozen=True)
class _Started:
    """Who starts the processes, ``devices`` on each of ``nodes`` machines; where nobody has, Fabric does."""

    by: Literal["nobody", "torchrun", "srun"]
    devices: int
    nodes: int

    def check(self, devices: int | None, nodes: int | None) -> None:
        asked = [("--devices", devices, self.devices), ("--nodes", nodes, self.nodes)]
        problems = [
            Problem(f"{self.by} has started {there}, not {number}", option, "leave the option out")
            for option, number, there in asked
            if number not in (None, there)
        ]
        if problems:
            raise ConfigError(problems)


def _started_outside() -> _Started | None:
    """What ``torchrun``, or ``srun``, has started; the batch script of a SLURM job is one process, whatever its tasks."""
    environ = os.environ
    if dist.is_torchelastic_launched():
        devices = int(environ["LOCAL_WORLD_SIZE"])
        return _Started("torchrun", devices, int(environ["WORLD_SIZE"]) // devices)
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1:
        return None
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", 1)))
    if "SLURM_NTASKS_PER_NODE" not in environ or tasks != nodes * int(environ["SLURM_NTASKS_PER_NODE"]):
        raise ConfigError.single(
            f"srun has started {tasks} tasks on {nodes} nodes, and nothing says how many on each",
            where="SLURM_NTASKS_PER_NODE",
            remedy="give srun --nodes and --ntasks-per-node, and leave --ntasks out",
        )
    return _Started("srun", tasks // nodes, nodes)


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Keep the launcher's notes on each process from the user; rank 0's come from either package."""
    libraries = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    before = [library.level for library in libraries]
    for library in libraries:
        library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for library, level in zip(libraries, before, strict=True):
            library.setLevel(level)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _problems(error: Exception | None, rank: int) -> tuple[Problem, ...]:
    """What a process has to tell rank 0."""
    if error is None:
        return ()
    if isinstance(error, WholeslideError):
        return error.problems
    return (Problem(f"a process has failed: {error}", f"rank {rank}", "see what that process says"),)


def _end_with(parent: int) -> None:
    """End this process, as SIGTERM would, when the one that started it has ended: nobody else would end it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
