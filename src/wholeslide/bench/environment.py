"""The facts without which a figure means nothing: processor, versions, and the machine's speed at the time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from wholeslide import __version__

_GEMM_SIDE = 3072
_GEMM_REPEATS = 5
#: No product is begun once this has passed.
_GEMM_SECONDS = 1.0


def environment() -> dict[str, Any]:
    """Versions, processor, memory, commit and the GEMM rate; no host names and no paths."""
    return {
        "wholeslide": __version__,
        "commit": commit_of(Path(__file__).parents[1]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning", "numpy")},
        **machine(),
        "gemm_gflops": {"fp32": gemm_gflops(torch.float32), "bf16": gemm_gflops(torch.bfloat16)},
    }


def machine() -> dict[str, Any]:
    """Processor, memory and accelerator; no host names."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def gemm_gflops(dtype: torch.dtype) -> float:
    """The best of a few square matrix products, in 10⁹ operations a second; of int8 they are summed in int32."""
    integer = dtype == torch.int8
    a = torch.randint(-127, 128, (_GEMM_SIDE, _GEMM_SIDE)) if integer else torch.rand((_GEMM_SIDE, _GEMM_SIDE))
    a, product = a.to(dtype), torch._int_mm if integer else torch.mm
    product(a, a)
    seconds: list[float] = []
    while len(seconds) < _GEMM_REPEATS and sum(seconds) < _GEMM_SECONDS:
        begun = time.perf_counter()
        product(a, a)
        seconds.append(time.perf_counter() - begun)
    return round(2 * _GEMM_SIDE**3 / min(seconds) / 1e9, 1)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", facts.read_text()) if facts.exists() else None
    return match[1].strip() if match else platform.processor()


def commit_of(package: Path) -> str | None:
    """The commit of a source checkout, with a plus sign where the package was changed; ``None`` for an installed one.

    What lies beside the package may change: results do while they are measured.
    """
    described = _said_by_git(package, "describe", "--always", "--exclude=*", "--abbrev=12")
    if described is None:
        return None
    changes = _said_by_git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return described + "+" * bool(changes)


def _said_by_git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
