from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wholeslide.errors import RunError
from wholeslide.slides.files import own_part
from wholeslide.train import checkpoint
from wholeslide.train.checkpoint import Checkpoints, Pointer, write_atomically
from wholeslide.train.run import claim_folder
from wholeslide.train.state import Best, LoopState


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def optimizer(network: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_saved_comes_back(checkpoints: Checkpoints, network: nn.Module, optimizer: torch.optim.AdamW) -> None:
    checkpoints.save(network, optimizer, LoopState(step=1, fresh_optimizer=False, seconds=0.1))
    other = nn.Linear(3, 2)
    resumed = torch.optim.AdamW(other.parameters())
    state = Checkpoints(checkpoints.folder).restore("last", other, resumed)
    assert state == LoopState(step=1, fresh_optimizer=False, seconds=0.1)
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    for saved, loaded in zip(network.parameters(), other.parameters(), strict=True):
        assert optimizer.state[saved].keys() == resumed.state[loaded].keys()
        for entry, value in optimizer.state[saved].items():
            assert torch.equal(resumed.state[loaded][entry], value)


def test_a_fresh_optimizer_is_left_fresh(
    checkpoints: Checkpoints, network: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    checkpoints.save(network, optimizer, LoopState(step=1, fresh_optimizer=True))
    resumed = torch.optim.AdamW(network.parameters())
    checkpoints.restore("last", network, resumed)
    assert not resumed.state


def test_only_what_is_needed_is_kept(checkpoints: Checkpoints, network: nn.Module, optimizer: Any) -> None:
    state = LoopState(step=1)
    checkpoints.save(network, optimizer, state)
    file, sha256 = checkpoints.write(network, optimizer, 1)
    state.best = Best(0.5, 0.5, 1, 1, file, sha256)
    checkpoints.point("best", Pointer(file, sha256, state))
    own_part(checkpoints.folder / "step-77.safetensors").write_bytes(b"left by a kill")
    for step in (2, 3):
        state.step = step
        checkpoints.save(network, optimizer, state)
    assert files(checkpoints.folder) == {"last.json", "best.json", "step-1.safetensors", "step-3.safetensors"}


def test_two_that_write_a_file_at_the_same_time_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins and ends while the first one's content is on its way to the disk."""
    path, sync, begun = tmp_path / "last.json", os.fsync, []

    def synced(handle: int) -> None:
        if not begun:
            begun.append(handle)
            write_atomically(path, b"the second one's")
            assert path.read_bytes() == b"the second one's"
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    write_atomically(path, b"the first one's, which is longer")
    assert path.read_bytes() == b"the first one's, which is longer"
    assert files(tmp_path) == {"last.json"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_what_was_not_written_leaves_nothing(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "last.json", b"new")
    with pytest.raises(type(error)):
        Checkpoints(tmp_path).write(network, torch.optim.AdamW(network.parameters()), 1)
    assert files(tmp_path) == set()


def test_tensors_of_a_step_are_written_once(
    checkpoints: Checkpoints, network: nn.Module, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda path, tensors: written.append(path.name) or "hash")
    for step in (0, 1, 1, 1, 2):
        checkpoints.write(network, optimizer, step)
    assert written == ["step-0.safetensors", "step-1.safetensors", "step-2.safetensors"]


def test_rolling_back_forgets_a_best_that_came_later(
    checkpoints: Checkpoints, network: nn.Module, optimizer: Any
) -> None:
    early, late = LoopState(step=1), LoopState(step=2)
    checkpoints.save(network, optimizer, early)
    file, sha256 = checkpoints.write(network, optimizer, 1)
    early.best = Best(0.5, 0.5, 1, 1, file, sha256)
    checkpoints.point("last", Pointer(file, sha256, early))
    later = checkpoints.write(network, optimizer, 2)
    checkpoints.point("best", Pointer(*later, late))  # here the kill strikes
    again = Checkpoints(checkpoints.folder)
    again.roll_back(again.pointer("last").state)
    assert again.pointer("best").file == "step-1.safetensors"
    assert files(checkpoints.folder) == {"last.json", "best.json", "step-1.safetensors"}
    early.best = None
    again.roll_back(early)
    assert not again.has("best")


@pytest.mark.parametrize("keep", [0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_refused(
    checkpoints: Checkpoints, network: nn.Module, optimizer: Any, keep: float
) -> None:
    checkpoints.save(network, optimizer, LoopState(step=4))
    path = checkpoints.folder / "step-4.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(RunError) as caught:
        checkpoints.restore("last", network, optimizer)
    assert str(caught.value) == (
        f"the checkpoint is truncated or changed ({path}): put back a copy of it, or train again in a new run directory"
    )


def test_one_changed_bit_is_noticed(checkpoints: Checkpoints, network: nn.Module, optimizer: Any) -> None:
    checkpoints.save(network, optimizer, LoopState(step=4))
    path = checkpoints.folder / "step-4.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="truncated or changed"):
        checkpoints.restore("last", network, optimizer)


def test_nothing_saved_yet(checkpoints: Checkpoints) -> None:
    with pytest.raises(RunError, match=r"there is no checkpoint \(.*best\.json\): train this run first"):
        checkpoints.pointer("best")


def test_another_network_is_refused(checkpoints: Checkpoints, network: nn.Module, optimizer: Any) -> None:
    checkpoints.save(network, optimizer, LoopState(step=4))
    with pytest.raises(RunError, match="does not fit the network"):
        checkpoints.restore("last", nn.Linear(4, 2))


def test_pointers_name_file_hash_and_step(checkpoints: Checkpoints, network: nn.Module, optimizer: Any) -> None:
    checkpoints.save(network, optimizer, LoopState(step=4))
    record = json.loads((checkpoints.folder / "last.json").read_text())
    assert record["format_version"] == 1
    assert record["file"] == "step-4.safetensors"
    assert record["step"] == 4
    assert record["sha256"] == checkpoint.file_sha256(checkpoints.folder / record["file"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_what_was_there(
    checkpoints: Checkpoints, network: nn.Module, optimizer: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    checkpoints.save(network, optimizer, LoopState(step=1))
    before = (checkpoints.folder / "last.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"the disk is full \(.*\): free some space and begin again"):
        checkpoints.save(network, optimizer, LoopState(step=2))
    monkeypatch.undo()
    assert (checkpoints.folder / "last.json").read_bytes() == before
    assert files(checkpoints.folder) == {"last.json", "step-1.safetensors"}
    checkpoints.restore("last", network, optimizer)


def test_other_failures_of_a_disk_are_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"), checkpoint.disk_errors(tmp_path):
        write_atomically(tmp_path / "file", b"content")


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    assert claim_folder(tmp_path / "new", resume=False) == "new"
    assert claim_folder(tmp_path / "new", resume=True) == "new"
    for name in ("checkpoints", "log"):
        (tmp_path / name).mkdir()
    (tmp_path / "cohort.csv").touch()
    assert claim_folder(tmp_path, resume=True) == "new", "a start that was cut off begins anew"
    with pytest.raises(RunError, match="the run directory exists"):
        claim_folder(tmp_path, resume=False)
    (tmp_path / "config.yaml").touch()
    assert claim_folder(tmp_path, resume=True) == "resume"
