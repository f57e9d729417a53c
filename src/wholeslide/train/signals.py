"""Leaving cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came, and what was done has been saved.

    ``exit_status`` is the shell's convention: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number


class SignalWatch:
    """Turns SIGINT and SIGTERM into :class:`Interrupted`, raised only where nothing can be left half done.

    Between :meth:`interruptible` blocks a signal is remembered, and raised by the next block or :meth:`check`.

    Attributes:
        before_leaving: called before :class:`Interrupted` is raised, and so before anything that the blocks have under
            way is ended, which may take long. Another signal does not interrupt it.
    """

    def __init__(self) -> None:
        self.before_leaving: Callable[[], None] | None = None
        self._received: int | None = None
        self._open = False

    def check(self) -> None:
        """Raise the signal that came meanwhile.

        Raises:
            Interrupted: one came.
        """
        if self._received is not None:
            self._leave(self._received)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that may be left at any point, because it changes nothing that is saved."""
        self.check()
        self._open = True
        try:
            yield
        finally:
            self._open = False
        self.check()

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        self._received = signal_number
        if self._open:
            self._open = False
            self._leave(signal_number)

    def _leave(self, signal_number: int) -> NoReturn:
        if self.before_leaving is not None:
            self.before_leaving()
        raise Interrupted(signal_number)


@contextmanager
def watch_signals() -> Iterator[SignalWatch]:
    """Watch for signals in a block; outside the main thread, where Python allows no handlers, nothing is watched."""
    watch = SignalWatch()
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, watch._handle) for number in numbers}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
