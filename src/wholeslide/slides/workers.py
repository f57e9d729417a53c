"""Processes that open and read slides, so that a decoder that crashes ends none but its own."""

from __future__ import annotations

import functools
import os
import queue
import signal
import socket
import subprocess
import sys
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from wholeslide.errors import ConfigError, Problem, SlideError
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


@dataclass(frozen=True)
class SlideFile:
    """A file as it was when it was opened: what replaces it later is another one.

    ``fast`` is whether its tiles are decoded directly.
    """

    path: Path
    stamp: tuple[int, int, int]
    fast: bool

    @classmethod
    def of(cls, path: Path, *, fast: bool) -> SlideFile:
        """What lies there now.

        Raises:
            OSError: there is nothing.
        """
        found = path.stat()
        return cls(path, (found.st_mtime_ns, found.st_size, found.st_ino), fast)


class Worker:
    """One process, asked one thing at a time. It ends when its connection does, however this process ends.

    Raises:
        ConfigError: it cannot be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        where = os.pathsep.join(
            folder for folder in sys.path if folder
        )  # not the folder that the user happens to be in
        with theirs:
            handle = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM.format(handle)],
                pass_fds=[handle],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": where},
            )
        self._connection = Connection(ours.detach())
        try:
            self._connection.recv()  # it is there
        except (EOFError, OSError) as error:
            what = f"a process that decodes slides cannot be started ({_told(self.end())})"
            remedy = "see what it says above, or give --decoders threads"
            raise ConfigError.single(what, where="--decoders", remedy=remedy) from error

    def ask(self, opened: frozenset[SlideFile], slide: SlideFile | None, method: str = "", *arguments: Any) -> Any:
        """What a method of the slide's reader gives; readers of slides that are not ``opened`` are closed.

        Raises:
            SlideError: the slide cannot be opened or read.
            EOFError: the process has ended.
        """
        try:
            self._connection.send((opened, slide, method, arguments))
            answer = self._connection.recv()
        except OSError as error:  # it has ended, maybe in the middle of its answer
            raise EOFError from error
        if isinstance(answer, _Failure):
            raise SlideError(answer.problems)
        return answer

    def end(self) -> int:
        """Let it end; its exit status, negative for a signal."""
        self._connection.close()
        return self.process.wait()

    def kill(self) -> None:
        """End it in the middle of an answer, which nobody will hear."""
        self.process.kill()
        self.end()


class Workers:
    """As many workers as there are cores, started when they are needed."""

    def __init__(self, count: int) -> None:
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._opened: Counter[SlideFile] = Counter()
        self._changing = Lock()

    def open(self, slide: SlideFile) -> Any:
        """The reader's attributes; workers keep it open until it is closed as often as it was opened.

        Raises:
            SlideError: it cannot be opened, or the worker crashed.
            ConfigError: no worker can be started.
        """
        with self._changing:
            self._opened[slide] += 1
        try:
            return self.ask(slide, "describe")
        except BaseException:
            self.close(slide)
            raise

    def close(self, slide: SlideFile) -> None:
        """Let all workers that have nothing to do close it, and the others before they do the next thing."""
        with self._changing:
            self._opened[slide] -= 1
            if self._opened[slide] > 0:
                return
            del self._opened[slide]
        for worker in self._all_idle():
            if worker is None:
                self._idle.put(None)
                continue
            try:
                worker.ask(self._kept(), None)
            except EOFError:
                worker.end()
                self._idle.put(None)
            else:
                self._idle.put(worker)

    def ask(self, slide: SlideFile, method: str, *arguments: Any) -> Any:
        """See :meth:`Worker.ask`.

        Raises:
            SlideError: as there, and where the worker crashed; the next one that is asked is a new one.
            ConfigError: no worker can be started.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                worker = Worker()
            return worker.ask(self._kept(), slide, method, *arguments)
        except SlideError:
            raise
        except EOFError:
            assert worker is not None
            status, worker = worker.end(), None
            raise slide_error(f"its decoder crashed ({_told(status)})", slide.path, CONVERT_REMEDY) from None
        except BaseException:
            if worker is not None:  # its answer is still to come, and must not be taken for that to another question
                worker.kill()
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        """End all that are idle."""
        for worker in self._all_idle():
            if worker is not None:
                worker.end()
            self._idle.put(None)

    def _kept(self) -> frozenset[SlideFile]:
        with self._changing:
            return frozenset(self._opened)

    def _all_idle(self) -> list[Worker | None]:
        """Taken from the queue, those first that are to be put back first."""
        found: list[Worker | None] = []
        with suppress(queue.Empty):
            while True:
                found.append(self._idle.get_nowait())
        return found[::-1]


@functools.cache
def decoding_processes() -> Workers:
    """Shared by all slides of a process."""
    return Workers(usable_cores())


if hasattr(os, "register_at_fork"):  # a copy of this process must not talk over the same connections
    os.register_at_fork(after_in_child=decoding_processes.cache_clear)


class Serving:
    """The worker's side: opens slides as they are asked for."""

    def __init__(self, open_slide: Any) -> None:
        self._open_slide = open_slide
        self._readers: OrderedDict[SlideFile, SlideReader] = OrderedDict()

    def run(self, connection: Connection) -> None:
        """Answer until the other side ends."""
        with suppress(EOFError, OSError):
            while True:
                opened, slide, method, arguments = connection.recv()
                for other in self._readers.keys() - opened:
                    self._readers.pop(other).close()
                connection.send(None if slide is None else self._answer(slide, method, arguments))

    def _answer(self, slide: SlideFile, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self, method)(self._reader(slide), *arguments)
        except SlideError as error:
            return _Failure(error.problems)
        except Exception as error:
            return _Failure((Problem(f"cannot be read: {error!r}", str(slide.path), CONVERT_REMEDY),))

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

    def _reader(self, slide: SlideFile) -> SlideReader:
        if slide not in self._readers:
            while len(self._readers) >= _OPEN_SLIDES:
                self._readers.popitem(last=False)[1].close()
            self._readers[slide] = self._open_slide(slide.path, fast=slide.fast)
        self._readers.move_to_end(slide)
        return self._readers[slide]


def ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; this one ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _told(status: int) -> str:
    names = {one.value: one.name for one in signal.Signals}
    return names.get(-status, f"signal {-status}") if status < 0 else f"exit status {status}"
