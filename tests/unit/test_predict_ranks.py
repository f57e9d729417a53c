"""Who shares a prediction: told by torchrun, by srun, or by the options. What is exchanged is tested end to end."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from wholeslide.errors import ConfigError, RunError
from wholeslide.predict import ranks
from wholeslide.predict.ranks import FailedElsewhereError, Ranks, device_of_rank, start_ranks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.fixture(autouse=True)
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What would be started. The environment is that of a shell."""
    for name in (*TORCHRUN, *SRUN, "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    calls: list[tuple[str, int, int]] = []

    def note(started: ranks._Started) -> Ranks:
        calls.append((started.by, started.devices, started.nodes))
        return Ranks()

    monkeypatch.setattr(ranks, "_joined", note)
    return calls


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("devices", "nodes"), [(None, None), (1, None), (1, 1)])
def test_one_process_starts_nothing(
    devices: int | None, nodes: int | None, joined: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in a batch script, which is one process
    alone = start_ranks(devices, nodes)
    assert (alone.rank, alone.count, alone.is_main, joined) == (0, 1, True, [])
    assert alone.from_main(lambda: 5) == alone.together(lambda: 5) == alone.gather(5)[0] == 5
    with pytest.raises(KeyError):
        alone.together(lambda: {}["missing"])


def test_several(joined: list[object]) -> None:
    start_ranks(4, None)
    start_ranks(None, 2)
    assert joined == [("nobody", 4, 1), ("nobody", 1, 2)]


@pytest.mark.parametrize(("by", "environment"), [("torchrun", TORCHRUN), ("srun", SRUN), ("torchrun", TORCHRUN | SRUN)])
def test_what_was_started_counts(
    by: str, environment: dict[str, str], joined: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, environment)
    start_ranks(None, None)
    start_ranks(2, 3)
    assert joined == [(by, 2, 3)] * 2
    with pytest.raises(ConfigError) as caught:
        start_ranks(4, 1)
    assert str(caught.value).splitlines() == [
        f"{by} has started 2, not 4 (--devices): leave the option out",
        f"{by} has started 3, not 1 (--nodes): leave the option out",
    ]


def test_tasks_that_are_not_told_by_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric would refuse them with advice for a training script."""
    set_all(monkeypatch, {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2"})
    with pytest.raises(
        ConfigError, match=r"srun has started 6 tasks on 2 nodes, .*: give srun --nodes and --ntasks-per"
    ):
        start_ranks(None, None)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second, third = (SimpleNamespace(count=3, rank=rank, local_rank=rank) for rank in (1, 2))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert device_of_rank(gpu, second) == torch.device("cuda", 1)  # type: ignore[arg-type]
    assert device_of_rank(cpu, third) == cpu  # type: ignore[arg-type]
    assert device_of_rank(gpu, Ranks()) == gpu
    with pytest.raises(ConfigError, match=r"only 2 CUDA devices on this machine \(--devices, rank 2\)"):
        device_of_rank(gpu, third)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    set_all(monkeypatch, SRUN)  # with --gpus-per-task=1
    assert device_of_rank(gpu, third) == torch.device("cuda", 0)  # type: ignore[arg-type]
    assert chosen == [1, 0]


class Exchange(Ranks):
    """This process, and what another one gives whenever they meet."""

    def __init__(self, rank: int, other: object) -> None:
        super().__init__()
        self.rank, self.count, self.other = rank, 2, other

    def gather(self, value: object) -> list[object]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


def failing() -> None:
    raise RunError.single("no", where="here", remedy="mend it")


def test_what_goes_wrong_is_raised_once() -> None:
    """By rank 0 for all that the user can mend; the others only end."""
    failure = RunError.single("not there", where="there", remedy="mend that").problems
    with pytest.raises(RunError, match=r"^no \(here\): mend it\nnot there \(there\): mend that$"):
        Exchange(0, failure).together(failing)
    with pytest.raises(FailedElsewhereError):
        Exchange(1, failure).together(lambda: 5)
    with pytest.raises(FailedElsewhereError):
        Exchange(1, ()).together(failing)
    with pytest.raises(RunError, match=r"^no \(here\): mend it$"):
        Exchange(0, (None, False)).from_main(failing)
    with pytest.raises(FailedElsewhereError):
        Exchange(1, (None, True)).from_main(lambda: pytest.fail("not here"))
    assert Exchange(1, (7, False)).from_main(lambda: pytest.fail("not here")) == 7
    assert Exchange(1, ()).together(lambda: 5) == 5


def test_a_fault_of_ours_is_raised_where_it_happened() -> None:
    for rank in (0, 1):
        with pytest.raises(KeyError, match="ours"):
            Exchange(rank, ()).together(lambda: {}["ours"])


CHILD = """
import os, sys, time
from wholeslide.predict.ranks import _end_with
_end_with(os.getppid())
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """However that ends: else it would go on, unseen, with a share of a prediction that nobody waits for."""
    words = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            time.sleep(0.5)
            assert child.is_running()
            parent.kill()
            _, alive = psutil.wait_procs([child], timeout=10)
            assert not alive
        finally:
            parent.kill()
            if child.is_running():
                child.kill()
