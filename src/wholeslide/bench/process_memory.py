"""What the system says of this process's memory."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import psutil

_SAMPLING_SECONDS = 0.02
_WORKERS_SAMPLING_SECONDS = 0.25


def reset_peak() -> None:
    """Let ``VmHWM`` start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"no {key} in /proc/self/status"
    return int(match[1]) * 1024


class AnonymousPeak:
    """The largest RssAnon, sampled on a thread: files that the system may drop are not in it."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, status_bytes("RssAnon"))
            self._done.wait(_SAMPLING_SECONDS)


class WorkersPeak:
    """The largest memory that this process's children hold together and share with nobody, sampled on a thread."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> WorkersPeak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._done.is_set():
            self.peak_bytes = max(self.peak_bytes, sum(_unshared_bytes(child) for child in own.children()))
            self._done.wait(_WORKERS_SAMPLING_SECONDS)


def _unshared_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has ended
        return 0
