"""Reading ahead: order, bounds, errors, and nothing left open."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import Any, cast

import pytest

from wholeslide.errors import SlideError
from wholeslide.slides.view import SlideView
from wholeslide.train.prefetch import read_ahead


class FakeView:
    """Counts what is open."""

    opened: list[str]
    live: set[str]

    def __init__(self, name: str, log: Log, failure: BaseException | None = None) -> None:
        self.name, self.log, self.failure = name, log, failure
        log.opened.append(name)
        log.live.add(name)
        log.most = max(log.most, len(log.live))
        self.limit: int | None = None

    def prefetch(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        self.log.live.discard(self.name)


class Log:
    def __init__(self) -> None:
        self.opened: list[str] = []
        self.live: set[str] = set()
        self.most = 0

    def open(self, name: str) -> SlideView:
        return cast(SlideView, FakeView(name, self))


def ahead(names: list[str], opener: Any, limit_bytes: int = 9) -> Any:
    return read_ahead(names, opener, name=str, limit_bytes=limit_bytes)


def test_items_come_in_order_and_one_is_read_ahead() -> None:
    log, seen = Log(), []
    for ready in ahead(list("abcd"), log.open):
        with ready.view() as view:
            seen.append(view.name)
            assert view.limit == 9
            time.sleep(0.05)
            position = "abcd".index(view.name)
            assert log.opened == list("abcd")[: position + 2], "the next one, and no more"
    assert seen == list("abcd")
    assert log.live == set()
    assert log.most == 2


def test_the_wait_is_measured() -> None:
    log = Log()

    def slow(name: str) -> SlideView:
        time.sleep(0.1)
        return log.open(name)

    waits = []
    for ready in ahead(list("abc"), slow):
        if waits:
            ready.future.result()  # what was read ahead is there
        with ready.view():
            waits.append(ready.wait_seconds)
    assert waits[0] > 0.05
    assert max(waits[1:]) < waits[0]


def test_an_error_belongs_to_its_own_item() -> None:
    log = Log()

    def opener(name: str) -> SlideView:
        if name == "b":
            raise SlideError.single("cannot be decoded", where="b", remedy="mend it")
        return log.open(name)

    done, failed = [], []
    for ready in ahead(list("abc"), opener):
        try:
            with ready.view():
                done.append(ready.item)
        except SlideError as error:
            failed.append((ready.item, str(error)))
    assert done == ["a", "c"]
    assert failed == [("b", "cannot be decoded (b): mend it")]
    assert log.live == set()


def test_a_failing_disk_names_the_slide() -> None:
    def opener(name: str) -> SlideView:
        raise OSError(5, "Input/output error")

    ready = next(ahead(["here.svs"], opener))
    with pytest.raises(SlideError, match=r"reading failed, .*Input/output error \(here\.svs\)"), ready.view():
        pass


def test_a_bug_names_the_slide_too() -> None:
    log = Log()
    failure = ZeroDivisionError("a bug")

    def opener(name: str) -> SlideView:
        return cast(SlideView, FakeView(name, log, failure))

    with closing(ahead(["here.svs"], opener)) as items, pytest.raises(ZeroDivisionError) as caught, next(items).view():
        pass
    assert caught.value.__notes__ == ["while reading here.svs ahead"]
    assert log.live == set(), "a view whose pixels cannot be loaded is closed"


@pytest.mark.parametrize("taken", [True, False])
def test_leaving_early_closes_everything(taken: bool) -> None:
    log = Log()
    items = ahead(list("abcd"), log.open)
    ready = next(items)
    if taken:
        with ready.view():
            pass
    time.sleep(0.05)
    items.close()
    assert log.live == set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_nothing_to_read() -> None:
    assert list(ahead([], Log().open)) == []
