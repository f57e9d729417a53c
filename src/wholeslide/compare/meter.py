"""What a cell takes, kept in its record while it runs, so that a kill costs a few seconds of it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from wholeslide.bench.process_memory import WorkersPeak, status_bytes
from wholeslide.compare.cells import Record

PERIOD_SECONDS = 15.0


class Meter:
    """Adds the wall time of a block and that of its cores to a record, and its peaks of memory, all while it runs.

    The resident peak is that of the process since it began; a cell has one of its own.
    """

    def __init__(self, record: Record, path: Path, *, period_seconds: float = PERIOD_SECONDS) -> None:
        self.record = record
        self._before, self._path, self._period_seconds = record, path, period_seconds
        self._workers = WorkersPeak()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Meter:
        self._begun, self._cpu_begun = time.monotonic(), time.process_time()
        self._workers.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._workers.__exit__(*exception)
        self._write()

    def _keep(self) -> None:
        while True:
            self._write()
            if self._done.wait(self._period_seconds):
                return

    def _write(self) -> None:
        before = self._before
        self.record = replace(
            before,
            train_seconds=before.train_seconds + time.monotonic() - self._begun,
            cpu_seconds=before.cpu_seconds + time.process_time() - self._cpu_begun,
            peak_bytes=max(before.peak_bytes, status_bytes("VmHWM") + self._workers.peak_bytes),
            peak_device_bytes=_device_peak(before.peak_device_bytes),
        )
        self.record.write(self._path)


def _device_peak(before: int | None) -> int | None:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return before
    return max(before or 0, torch.cuda.max_memory_reserved())
