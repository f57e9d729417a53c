"""Processes that open and read slides, so that a decoder that crashes ends none but its own."""

from __future__ import annotations

import functools
import os
import queue
import signal
import socket
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from wholeslide.errors import Problem, SlideError
from wholeslide.slides.decoders import usable_cores
from wholeslide.slides.readers import CONVERT_REMEDY, Rgb, SlideReader, slide_error

#: Slides that a worker keeps open.
_OPEN_SLIDES = 2
#: What a worker runs, given the number of its end of the connection.
_PROGRAM = "from wholeslide.slides.worker import serve; serve({})"


@dataclass(frozen=True)
class _Failure:
    """A slide's problems, on their way to the process that asked."""

    problems: tuple[Problem, ...]


class Worker:
    """One process, asked one thing at a time. It ends when its connection does, however this process ends."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            handle = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(handle)], pass_fds=[handle], stdin=subprocess.DEVNULL
            )
        self._connection = Connection(ours.detach())

    def ask(self, path: Path, method: str, *arguments: Any) -> Any:
        """What a method of the slide's reader gives.

        Raises:
            SlideError: the slide cannot be opened or read.
            EOFError: the process has ended.
        """
        try:
            self._connection.send((path, method, arguments))
            answer = self._connection.recv()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error
        if isinstance(answer, _Failure):
            raise SlideError(answer.problems)
        return answer

    def end(self) -> int:
        """Let it end; its exit status, negative for a signal."""
        self._connection.close()
        return self.process.wait()


class Workers:
    """As many workers as there are cores, started when they are needed."""

    def __init__(self, count: int) -> None:
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def ask(self, path: Path, method: str, *arguments: Any) -> Any:
        """See :meth:`Worker.ask`.

        Raises:
            SlideError: as there, and where the worker crashed; the next one that is asked is a new one.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                worker = Worker()
            return worker.ask(path, method, *arguments)
        except EOFError:
            assert worker is not None
            status, worker = worker.end(), None
            raise slide_error(f"its decoder crashed ({_told(status)})", path, CONVERT_REMEDY) from None
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        """End all that are idle."""
        with suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker is not None:
                    worker.end()


@functools.cache
def decoding_processes() -> Workers:
    """Shared by all slides of a process."""
    return Workers(usable_cores())


class Serving:
    """The worker's side: opens slides as they are asked for."""

    def __init__(self, open_slide: Any) -> None:
        self._open_slide = open_slide
        self._readers: OrderedDict[Path, SlideReader] = OrderedDict()

    def run(self, connection: Connection) -> None:
        """Answer until the other side ends."""
        with suppress(EOFError, OSError):
            while True:
                path, method, arguments = connection.recv()
                connection.send(self._answer(path, method, arguments))

    def _answer(self, path: Path, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self, method)(self._reader(path), *arguments)
        except SlideError as error:
            return _Failure(error.problems)
        except Exception as error:
            return _Failure((Problem(f"cannot be read: {error!r}", str(path), CONVERT_REMEDY),))

    def describe(self, reader: SlideReader) -> dict[str, Any]:
        """The attributes of the reader, by name."""
        names = ("vendor", "levels", "l0_mpp", "l0_bounds", "is_plain_image", "description", "icc_profile")
        return {name: getattr(reader, name) for name in names}

    def reduction_for(self, reader: SlideReader, level: int, ratio_x: float, ratio_y: float) -> int:
        """As the reader tells."""
        return reader.reduction_for(level, ratio_x, ratio_y)

    def read_level(self, reader: SlideReader, level: int, box: Any, background_rgb: Rgb, reduction: int) -> Any:
        """Pixels, and whether any so far was transparent."""
        pixels = reader.read_level(level, box, background_rgb, reduction=reduction)
        return pixels, reader.met_transparency

    def _reader(self, path: Path) -> SlideReader:
        if path not in self._readers:
            while len(self._readers) >= _OPEN_SLIDES:
                self._readers.popitem(last=False)[1].close()
            self._readers[path] = self._open_slide(path)
        self._readers.move_to_end(path)
        return self._readers[path]


def ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; this one ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _told(status: int) -> str:
    return (
        signal.Signals(-status).name
        if status < 0
        else f"exit status {os.WEXITSTATUS(status) if status > 255 else status}"
    )
