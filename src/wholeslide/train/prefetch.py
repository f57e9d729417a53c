"""The next slide is opened and read on one background thread while the engine works on this one.

Every draw is seeded by what it is for, so reading ahead cannot change one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from wholeslide.errors import SlideError, WholeslideError

logger = logging.getLogger(__name__)


class View(Protocol):
    """What a slide is read as: pixels, or the features of its patches."""

    def prefetch(self, limit_bytes: int) -> None:
        """Take all of it into memory, if it is no more than so many bytes."""

    def close(self) -> None:
        """Let go of file and memory."""


T = TypeVar("T")
V = TypeVar("V", bound=View)


@dataclass
class Ready(Generic[T, V]):
    """An item whose view was read ahead.

    ``wait_seconds``, known once :meth:`view` was entered, is how long the caller stood still for pixels.
    """

    item: T
    future: Future[V]
    wait_seconds: float = 0.0
    taken: bool = False

    @contextmanager
    def view(self) -> Iterator[V]:
        """The view, closed at the end of the block.

        Raises:
            SlideError: it could not be opened or read.
        """
        self.taken = True
        begin = time.perf_counter()
        view = self.future.result()
        self.wait_seconds = time.perf_counter() - begin
        with closing(view):
            yield view


def read_ahead(
    items: Sequence[T], open_view: Callable[[T], V], *, name: Callable[[T], str], limit_bytes: int
) -> Generator[Ready[T, V], None, None]:
    """Every item in order, the one after it being opened meanwhile.

    A view's pixels are held in memory if they take no more than ``limit_bytes``; otherwise they are read as they are
    needed, as where memory does not suffice. What goes wrong with an item is raised by its own :meth:`Ready.view`, naming it.
    """

    def load(item: T) -> V:
        try:
            view = open_view(item)
            try:
                view.prefetch(limit_bytes)
            except MemoryError:
                logger.info("%s is not held in memory, where there is no room for it", name(item))
            except BaseException:
                view.close()
                raise
        except WholeslideError:
            raise
        except OSError as error:
            raise SlideError.single(
                f"reading failed, {error}", where=name(item), remedy="check the file and the disk or network it lies on"
            ) from error
        except Exception as error:
            error.add_note(f"while reading {name(item)} ahead")
            raise
        return view

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    waiting: list[Ready[T, V]] = []
    try:
        for index, item in enumerate(items):
            if not waiting:
                waiting.append(Ready(item, executor.submit(load, item)))
            if index + 1 < len(items):
                waiting.append(Ready(items[index + 1], executor.submit(load, items[index + 1])))
            yield waiting[0]
            _abandon(waiting.pop(0))
    finally:
        for ready in reversed(waiting):
            _abandon(ready)
        executor.shutdown(wait=True)


def _abandon(ready: Ready[T, V]) -> None:
    """Close a view that nobody took."""
    if ready.taken or ready.future.cancel():
        return
    if ready.future.exception() is None:
        ready.future.result().close()
