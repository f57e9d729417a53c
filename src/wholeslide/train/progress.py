"""The one progress bar: time left, seconds and memory a slide. Silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wholeslide.train.config import GIB


class ProgressTask:
    """One bar. Without a terminal every call does nothing."""

    def __init__(self, progress: Progress | None, description: str, total: int, completed: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, completed=completed, note="") if progress else None

    def advance(self, note: str = "") -> None:
        """One more is done; ``note`` stands behind the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, note=note)


@contextmanager
def progress_bar(description: str, total: int, *, completed: int = 0, quiet: bool = False) -> Iterator[ProgressTask]:
    """A bar on stderr for the length of a block; nothing if ``quiet`` or if stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield ProgressTask(None, description, total, completed)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield ProgressTask(progress, description, total, completed)


def memory_bytes(device: torch.device) -> int:
    """Memory in use: reserved memory of a CUDA device, otherwise what of this process is resident."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    return int(psutil.Process().memory_info().rss)


def slide_note(seconds: float, used_bytes: int) -> str:
    """What stands behind the bar."""
    return f"{seconds:.1f} s/slide, {used_bytes / GIB:.2f} GiB"
