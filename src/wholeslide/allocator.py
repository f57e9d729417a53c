"""Keep freed memory where the next tile finds it, and give it back to the system where there is too much of it.

A streamed step allocates and frees thousands of tensors of a few MiB. glibc maps every block above a threshold anew, and each
new page costs a fault, in sum more than the arithmetic; blocks below it are reused, but freed ones stay resident behind the small
ones that survive among them, so that memory creeps up to a multiple of what is in use. Both are avoided: the threshold is fixed
at its highest (glibc would move it), so that tiles share the same pages, and what has piled up is returned when a tile might
otherwise take more than was planned. All threads share one pool, too: with a pool each, as glibc gives them, what the threads
that read pixels have freed (86 MiB, measured with two) serves nobody else. Elsewhere (macOS, Windows, musl) nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

import psutil

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

THRESHOLD_BYTES = 32 << 20
"""Blocks of at least this size live in their own mapping; glibc allows no higher value."""

NEVER_BYTES = 1 << 30
"""`free` gives nothing back by itself up to here: :func:`return_freed_memory` does."""


@functools.cache
def fix_thresholds() -> bool:
    """Fix glibc's thresholds for this process, and let its threads share one pool.

    May be called any number of times, before or after torch's import; pools that threads have already are kept.

    Returns:
        Whether they are set: False where the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch maps its largest tensors in huge pages
    library = _glibc()
    if library is None:
        return False
    library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    options = ((M_MMAP_THRESHOLD, THRESHOLD_BYTES), (M_TRIM_THRESHOLD, NEVER_BYTES), (M_ARENA_MAX, 1))
    taken = [bool(library.mallopt(option, value)) for option, value in options]
    return all(taken)


def return_freed_memory() -> None:
    """Give free pages back to the system; what is given back has to be faulted in again when it is next used."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


class Room:
    """What a process may come to hold. Freed memory is given back only where the room left is too small for what comes."""

    def __init__(self) -> None:
        self._process, self._limit_bytes = psutil.Process(), 0

    def begin(self, room_bytes: int) -> None:
        """Give back all that is free, and allow ``room_bytes`` more than what is resident then."""
        return_freed_memory()
        self._limit_bytes = self._process.memory_info().rss + room_bytes

    def make(self, needed_bytes: int) -> None:
        """Before so much is allocated, none of which may fit where something was freed."""
        if self._process.memory_info().rss + needed_bytes > self._limit_bytes:
            return_freed_memory()


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    library.malloc_trim.argtypes = (ctypes.c_size_t,)
    return library
