"""Remembers what the micro-benchmark found, so that two runs on one machine compute in the same way, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from wholeslide import __version__
from wholeslide.model.network import LocalNetwork
from wholeslide.streaming.execution import Execution, Timing, choose_execution
from wholeslide.streaming.execution import PrecisionChoice as Choice

_log = logging.getLogger(__name__)

Found = TypeVar("Found")

#: Raised where the engine computes the same in another way, so that it is timed anew.
_ARITHMETIC = 2


def remembered_execution(network: LocalNetwork, precision: Choice, device: torch.device) -> tuple[Execution, Timing]:
    """The fastest execution, timed once for this machine, network and set of versions."""
    facts = {
        "precision": precision,
        "stages": [[stage.in_channels, stage.out_channels, stage.stride] for stage in network.stages],
        "layers": [str(type(layer).__name__) + layer.extra_repr() for layer in network.modules()],
        "trained": sum(p.requires_grad for p in network.parameters()),
    }
    return remembered("execution", facts, device, _parsed, lambda: choose_execution(network, precision, device))


def remembered(
    name: str,
    facts: Mapping[str, Any],
    device: torch.device,
    parse: Callable[[Any], Found],
    measure: Callable[[], Found],
) -> Found:
    """What a micro-benchmark found, from the user's cache folder; measured anew where that cannot be read or written.

    Args:
        name: of the benchmark.
        facts: what the answer depends on, beside this machine and the versions; JSON can hold them.
        device: where it is measured.
        parse: makes the answer of what JSON read; a ``ValueError``, ``KeyError`` or ``TypeError`` has it measured anew.
        measure: finds an answer that JSON can hold, dataclasses in it included.
    """
    path = _cache_file(name, facts, device)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent, or left by another version
        return parse(json.loads(path.read_text()))
    found = measure()
    _write(path, found)
    return found


def _cache_file(name: str, facts: Mapping[str, Any], device: torch.device) -> Path:
    depends_on = {
        "arithmetic": _ARITHMETIC,
        "versions": [__version__, torch.__version__],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **facts,
    }
    key = hashlib.blake2b(json.dumps(depends_on, sort_keys=True).encode(), digest_size=12).hexdigest()
    return _cache_folder() / "wholeslide" / f"{name}-{key}.json"


def _parsed(values: Any) -> tuple[Execution, Timing]:
    execution, timing = values
    return Execution(**execution), Timing(**{name: tuple(seconds) for name, seconds in timing.items()})


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


def _write(path: Path, found: object) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(found, default=asdict))
        beside.replace(path)
    except OSError as error:
        _log.debug("the timing of this machine is not remembered: %s", error)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
