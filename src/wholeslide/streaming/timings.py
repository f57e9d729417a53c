"""Remembers what the micro-benchmark found, so that two runs on one machine compute in the same way, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from wholeslide import __version__
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.execution import Execution, Timing, choose_execution
from wholeslide.streaming.execution import PrecisionChoice as Choice

_log = logging.getLogger(__name__)

#: Raised where the engine computes the same in another way, so that it is timed anew.
_ARITHMETIC = 2


def remembered_execution(network: LocalNetwork, precision: Choice, device: torch.device) -> tuple[Execution, Timing]:
    """The fastest execution, timed once for this machine, network and set of versions.

    The answer is kept in the user's cache folder; where that cannot be written, it is timed anew each time.
    """
    path = _cache_file(network, precision, device)
    found = _read(path)
    if found is None:
        found = choose_execution(network, precision, device)
        _write(path, found)
    return found


def _cache_file(network: LocalNetwork, precision: Choice, device: torch.device) -> Path:
    facts = {
        "arithmetic": _ARITHMETIC,
        "versions": [__version__, torch.__version__],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "precision": precision,
        "stages": [[stage.in_channels, stage.out_channels, stage.stride] for stage in network.stages],
        "layers": [str(type(layer).__name__) + layer.extra_repr() for layer in network.modules()],
        "trained": sum(p.requires_grad for p in network.parameters()),
    }
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    return _cache_folder() / "wholeslide" / f"execution-{key}.json"


def _cache_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir())


def _processor() -> list[str]:
    """Model and instructions: the nodes of a cluster share a cache folder, and only some compute bf16 natively."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor(), platform.machine()]
    found = {line.split(":")[0].strip(): line for line in reversed(lines) if line.startswith(("model name", "flags"))}
    return [platform.machine(), *sorted(found.values())]


def _read(path: Path) -> tuple[Execution, Timing] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        timing = Timing(**{name: tuple(seconds) for name, seconds in values["timing"].items()})
        return Execution(**values["execution"]), timing
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or left by another version: time again


def _write(path: Path, found: tuple[Execution, Timing]) -> None:
    execution, timing = found
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"execution": asdict(execution), "timing": asdict(timing)}))
        beside.replace(path)
    except OSError as error:
        _log.debug("the timing of this machine is not remembered: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
