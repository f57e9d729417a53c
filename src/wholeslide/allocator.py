"""Give freed tiles back to the system.

glibc raises its own threshold for `mmap` up to 32 MiB as blocks of that size are freed, and keeps later blocks below it
in its heap, where one small survivor pins everything under it. A streamed step allocates and frees thousands of
tiles of a few MiB, so the resident memory would creep up to a multiple of what is in use. Fixing the thresholds
switches that adjustment off. Elsewhere (macOS, Windows, musl) nothing is done.

Memory that is mapped anew must be faulted in anew: a third of a step's time in pages of 4 KiB. Torch is therefore asked to
map large tensors in huge pages, which takes that to a tenth; it reads the setting at its first allocation.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

THRESHOLD_BYTES = 1 << 20
"""Blocks above it live in their own mapping, which `free` returns; below it a page fault costs more than it saves."""


@functools.cache
def return_freed_memory() -> bool:
    """Fix glibc's two thresholds for this process. May be called any number of times, before or after torch's import.

    Returns:
        Whether the thresholds are set: False where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, THRESHOLD_BYTES))
