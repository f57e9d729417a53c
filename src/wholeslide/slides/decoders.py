"""The threads that decode stored tiles, shared by all slides of a process."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@functools.cache
def decoding_threads() -> ThreadPoolExecutor:
    """One for each core; decoders let go of Python's lock. What runs on them must not wait for others on them."""
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="decode")


if hasattr(os, "register_at_fork"):  # threads are not copied with a process
    os.register_at_fork(after_in_child=decoding_threads.cache_clear)
