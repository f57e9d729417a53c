"""Checkpoints: tensors in safetensors, the rest in JSON; a kill or a full disk leaves the last good one.

``step-N.safetensors`` holds the network and the optimiser after N optimiser steps. ``last.json`` and ``best.json`` name
such a file with its hash and carry the loop's state. The order of writing is: tensors, pointer, then the clearing
of files that no pointer names; whatever moment a kill strikes, the pointers are whole and what they name is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from wholeslide.errors import RunError
from wholeslide.slides.files import FULL, own_part, sync_folder
from wholeslide.train.optim import load_optimizer_tensors, optimizer_tensors
from wholeslide.train.state import LoopState

FORMAT_VERSION = 1
Which = Literal["last", "best"]

_NETWORK, _OPTIMIZER = "network:", "optimizer:"


@dataclass(frozen=True)
class Pointer:
    """What ``last.json`` and ``best.json`` say."""

    file: str
    sha256: str
    state: LoopState

    def to_json(self) -> bytes:
        values = {
            "format_version": FORMAT_VERSION,
            "file": self.file,
            "sha256": self.sha256,
            "step": self.state.step,
            "state": self.state.to_dict(),
        }
        return json.dumps(values, indent=2).encode()


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: tuple[str, str] | None = None  # name and hash of the file that equals what is in memory

    def save(self, network: nn.Module, optimizer: torch.optim.Optimizer, state: LoopState) -> None:
        """Write the state, and the tensors unless those of this step are there already, and point ``last.json`` there.

        Raises:
            RunError: the disk is full; the checkpoint before this one is still whole.
        """
        file, sha256 = self.write(network, optimizer, state.step)
        self.point("last", Pointer(file, sha256, state))
        self._clear(state)

    def write(self, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> tuple[str, str]:
        """Write the tensors, unless those of this step are on disk already. Returns the file's name and hash.

        Raises:
            RunError: the disk is full.
        """
        name = f"step-{step}.safetensors"
        if self._held is None or self._held[0] != name:
            tensors = {_NETWORK + key: value for key, value in network.state_dict().items()}
            tensors |= {_OPTIMIZER + key: value for key, value in optimizer_tensors(network, optimizer).items()}
            with disk_errors(self.folder):
                self._held = name, _write_tensors(self.folder / name, tensors)
        return self._held

    def point(self, which: Which, pointer: Pointer) -> None:
        """Swap a pointer."""
        with disk_errors(self.folder):
            write_atomically(self.folder / f"{which}.json", pointer.to_json())

    def forget_best(self) -> None:
        """Remove ``best.json``: no epoch of the stages being trained is finished."""
        (self.folder / "best.json").unlink(missing_ok=True)

    def has(self, which: Which) -> bool:
        return (self.folder / f"{which}.json").exists()

    def pointer(self, which: Which) -> Pointer:
        """Read a pointer.

        Raises:
            RunError: it is missing or damaged, or of a format that this version does not know.
        """
        path = self.folder / f"{which}.json"
        if not path.exists():
            raise RunError.single(
                "there is no checkpoint", where=str(path), remedy="train this run first, or give another run directory"
            )
        try:
            values = json.loads(path.read_bytes())
            check_format(values["format_version"], path)
            return Pointer(values["file"], values["sha256"], LoopState.from_dict(values["state"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise RunError.single(
                "the checkpoint's record is damaged",
                where=str(path),
                remedy="put back a copy of it, or train again in a new run directory",
            ) from error

    def read(self, which: Which) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Pointer]:
        """Tensors of the network, of the optimiser, and what else was saved.

        Raises:
            RunError: the file is missing, truncated or not the one that was saved.
        """
        pointer = self.pointer(which)
        path = self.folder / pointer.file
        if not path.exists():
            raise RunError.single("the checkpoint is missing", where=str(path), remedy=self._remedy(which, pointer))
        if file_sha256(path) != pointer.sha256:
            raise RunError.single(
                "the checkpoint is truncated or changed", where=str(path), remedy=self._remedy(which, pointer)
            )
        tensors = load_file(path)
        return _part(tensors, _NETWORK), _part(tensors, _OPTIMIZER), pointer

    def restore(self, which: Which, network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> LoopState:
        """Load a checkpoint into a network and, if given, its optimiser; returns the loop's state.

        Raises:
            RunError: the checkpoint is damaged or belongs to another network.
        """
        weights, moments, pointer = self.read(which)
        load_network_tensors(network, weights, where=str(self.folder / pointer.file))
        if optimizer is not None and not pointer.state.fresh_optimizer:
            load_optimizer_tensors(network, optimizer, moments, where=str(self.folder / pointer.file))
        self._held = pointer.file, pointer.sha256
        return pointer.state

    def roll_back(self, state: LoopState) -> None:
        """Forget what was written after ``state``: a kill can strike between the swaps of the two pointers."""
        if state.best is None:
            self.forget_best()
        elif (self.pointer("best").file, self.pointer("best").sha256) != (state.best.file, state.best.sha256):
            self.point("best", Pointer(state.best.file, state.best.sha256, state))
        self._clear(state)

    def _clear(self, state: LoopState) -> None:
        named = {self.pointer("last").file}
        if state.best is not None:
            named.add(state.best.file)
        for path in [*self.folder.glob("step-*.safetensors"), *self.folder.glob("*.part")]:
            if path.name not in named:
                path.unlink()

    def _remedy(self, which: Which, damaged: Pointer) -> str:
        other: Which = "best" if which == "last" else "last"
        again = "put back a copy of it, or train again in a new run directory"
        if not self.has(other) or self.pointer(other).file == damaged.file:
            return again
        return f"{again}; or copy {other}.json over {which}.json to use step {self.pointer(other).state.step} instead"


def load_network_tensors(network: nn.Module, tensors: dict[str, torch.Tensor], *, where: str) -> None:
    """Load a network's weights, all of them.

    Raises:
        RunError: names or shapes are not those of this network.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError.single(
            "the checkpoint does not fit the network that config.yaml describes",
            where=where,
            remedy="use the wholeslide and timm that config.yaml names, or put back this run's config.yaml",
        ) from error


def check_format(version: object, path: Path) -> None:
    """Refuse a format that this version of wholeslide does not know.

    Raises:
        RunError: it is unknown.
    """
    if version != FORMAT_VERSION:
        raise RunError.single(
            f"format version {version} is unknown",
            where=str(path),
            remedy=f"this wholeslide reads version {FORMAT_VERSION}: use the one that config.yaml names",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say a full disk in the user's words.

    Raises:
        RunError: the block could not write because the disk, a quota or a limit is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise RunError.single(
            "the disk is full",
            where=str(path),
            remedy="free some space and begin again, with --resume where there is a run to go on with",
        ) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number}" in str(error) for number in FULL)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that every reader sees the old or the new content, whole, even after a power cut.

    Of several that write it at the same time, the last one's content stays.
    """
    part = own_part(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def file_sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    part = own_part(path)
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        save_file(plain, part, metadata={"format_version": str(FORMAT_VERSION)})
        part.chmod(0o644)  # safetensors writes for the owner alone
        with part.open("rb") as file:
            os.fsync(file.fileno())
        sha256 = file_sha256(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    return sha256


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
