"""Processes that open and read slides, so that a decoder that crashes, or never ends, ends none but its own."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any
from weakref import WeakSet

from wholeslide.errors import ConfigError, Problem, SlideError
from wholeslide.slides.decoders import usable_cores
from wholeslide.slides.readers import CONVERT_REMEDY, slide_error
from wholeslide.slides.slide_file import SlideFile

logger = logging.getLogger(__name__)

#: What a worker runs, given the number of its end of the connection.
_PROGRAM = "from wholeslide.slides.worker import serve; serve({})"
#: How long a worker may be silent before an answer, or in the middle of one. A slide of one single strip, decoded whole from a
#: slow disk, takes minutes.
_PATIENCE_SECONDS = 600.0
_LOOK_SECONDS = 1.0
#: How long a worker may take to end, which has nothing left to do.
_ENDING_SECONDS = 10.0
_SILENT_REMEDY = f"see whether the disk that it lies on answers; if it does, {CONVERT_REMEDY}"
_START_REMEDY = "see what it says above, or give --decoders threads"


class _SilentError(Exception):
    """A worker has not answered in time."""


@dataclass(frozen=True)
class Failure:
    """A slide's problems, on their way to the process that asked."""

    problems: tuple[Problem, ...]


class Worker:
    """One process, asked one thing at a time. It ends when its connection does, however this process ends.

    Raises:
        ConfigError: it cannot be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        _WORKERS.add(self)
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
        try:
            self._heard()  # it is there
        except (EOFError, OSError) as error:
            what = f"a process that decodes slides cannot be started ({_told(self.end())})"
            raise ConfigError.single(what, where="--decoders", remedy=_START_REMEDY) from error
        except _SilentError as error:
            self.kill()
            what = f"a process that decodes slides did not start within {_PATIENCE_SECONDS:g} s"
            raise ConfigError.single(what, where="--decoders", remedy=_START_REMEDY) from error
        except BaseException:
            self.kill()
            raise

    def ask(self, opened: frozenset[SlideFile], slide: SlideFile | None, method: str = "", *arguments: Any) -> Any:
        """What a method of the slide's reader gives; readers of slides that are not ``opened`` are closed.

        Raises:
            SlideError: the slide cannot be opened or read.
            EOFError: the process has ended.
            _SilentError: it has not answered in time, and may still do so.
        """
        try:
            self._connection.send((opened, slide, method, arguments))
            answer = self._heard()
        except OSError as error:  # it has ended, maybe in the middle of its answer
            raise EOFError from error
        if isinstance(answer, Failure):
            raise SlideError(answer.problems)
        return answer

    def hang_up(self) -> None:
        """Let it end, without waiting for that."""
        self._connection.close()

    def end(self) -> int:
        """Let it end; its exit status, negative for a signal."""
        self.hang_up()
        try:
            return self.process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def kill(self) -> None:
        """End it in the middle of an answer, which nobody will hear."""
        self.process.kill()
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk that is gone ends when the disk is back
            self.process.wait(_ENDING_SECONDS)

    def leave(self) -> None:
        """Leave it to the process that this one is a copy of."""
        with suppress(OSError):  # another thread was closing it
            self._connection.close()
        if hasattr(self, "process"):
            self.process.returncode = 0  # not this process's child, and not to be waited for

    def _heard(self) -> Any:
        """What it says. The wait is counted in looks: a time in which all of this is stopped (Ctrl-Z) is one look.

        Raises:
            EOFError, OSError: it has ended.
            _SilentError: it says nothing, or does not go on.
        """
        waited_seconds = 0.0
        while not self._connection.poll(_LOOK_SECONDS):
            waited_seconds += _LOOK_SECONDS
            if waited_seconds >= _PATIENCE_SECONDS:
                raise _SilentError
        self._limit_reads()
        try:
            return self._connection.recv()
        except BlockingIOError as error:  # how a read ends that has taken too long
            raise _SilentError from error

    def _limit_reads(self) -> None:
        """Wait for the rest of an answer no longer than for its beginning; a read begins anew after all of this was stopped."""
        limit = struct.pack("ll", int(_PATIENCE_SECONDS), int(_PATIENCE_SECONDS % 1 * 1e6))
        with socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


class Workers:
    """As many workers as there are cores, started when they are needed; a copy of this process starts its own."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._opened: Counter[SlideFile] = Counter()
        self.begin()
        _POOLS.add(self)

    def begin(self) -> None:
        """Have no worker started, and nobody at work with one; slides that are open stay so."""
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self._count):
            self._idle.put(None)
        self._changing = Lock()

    def open(self, slide: SlideFile) -> Any:
        """The reader's attributes; workers keep it open until it is closed as often as it was opened.

        Raises:
            SlideError: it cannot be opened, or the worker crashed or did not answer.
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
        taken: list[Worker | None] = []
        try:
            self._take_idle(taken)
            for number, worker in enumerate(taken):
                taken[number] = None
                if worker is not None and self._lets_go(worker, slide):
                    taken[number] = worker
        finally:
            self._put_back(taken)

    def ask(self, slide: SlideFile, method: str, *arguments: Any) -> Any:
        """See :meth:`Worker.ask`.

        Raises:
            SlideError: as there, and where the worker crashed or did not answer; the next one that is asked is a new one.
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
            ended, worker = worker, None
            raise slide_error(f"its decoder crashed ({_told(ended.end())})", slide.path, CONVERT_REMEDY) from None
        except _SilentError:
            assert worker is not None
            ended, worker = worker, None
            ended.kill()
            what = f"its decoder gave no answer within {_PATIENCE_SECONDS:g} s, and was ended"
            raise slide_error(what, slide.path, _SILENT_REMEDY) from None
        except BaseException:
            if worker is not None:  # its answer is still to come, and must not be taken for that to another question
                ended, worker = worker, None
                ended.kill()
            raise
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        """End all that are idle."""
        taken: list[Worker | None] = []
        try:
            self._take_idle(taken)
            for worker in taken:
                if worker is not None:
                    worker.hang_up()  # all end at the same time
            for number, worker in enumerate(taken):
                taken[number] = None
                if worker is not None:
                    worker.end()
        finally:
            self._put_back(taken)

    def _lets_go(self, worker: Worker, slide: SlideFile) -> bool:
        """Whether a worker has closed a slide and goes on; it has ended otherwise."""
        try:
            worker.ask(self._kept(), None)
        except EOFError:
            worker.end()
            return False
        except _SilentError:
            worker.kill()
            what = "%s: its decoder did not close it within %g s, and was ended"
            logger.warning(what, slide.path, _PATIENCE_SECONDS)
            return False
        except BaseException:
            worker.kill()
            raise
        return True

    def _kept(self) -> frozenset[SlideFile]:
        with self._changing:
            return frozenset(self._opened)

    def _take_idle(self, taken: list[Worker | None]) -> None:
        with suppress(queue.Empty):
            while True:
                taken.append(self._idle.get_nowait())

    def _put_back(self, taken: list[Worker | None]) -> None:
        for worker in reversed(taken):
            self._idle.put(worker)


_WORKERS: WeakSet[Worker] = WeakSet()
_POOLS: WeakSet[Workers] = WeakSet()


@functools.cache
def decoding_processes() -> Workers:
    """Shared by all slides of a process, and ended with it."""
    pool = Workers(usable_cores())
    atexit.register(pool.end)
    return pool


def _begin_anew() -> None:
    """In a copy of this process, which must not talk over the same connections; nor may they outlast those who made them."""
    for worker in list(_WORKERS):
        worker.leave()
    for pool in list(_POOLS):
        pool.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _told(status: int) -> str:
    names = {one.value: one.name for one in signal.Signals}
    return names.get(-status, f"signal {-status}") if status < 0 else f"exit status {status}"
