"""A signal, a slide or a disk that ends a run: what was done is saved, and a resumed run ends in the same weights."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from train_tiny import Whole, assert_same_end, tiny_config

from wholeslide.errors import SlideError, StoreError, WholeslideError
from wholeslide.slides.view import SlideView
from wholeslide.streaming.engine import StreamingEngine
from wholeslide.train.loop import train
from wholeslide.train.signals import Interrupted
from wholeslide.train.trainer import Trainer
from wholeslide.train.views import Entry, ViewSource

pytestmark = pytest.mark.usefixtures("arithmetic")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(
    manifest: Path,
    tmp_path: Path,
    whole_run: Whole,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    """In the middle of a group: what the group has accumulated is thrown away, nothing else."""
    step = StreamingEngine.step
    calls = 0

    def signalled(self: StreamingEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = step(self, *args, **kwargs)
        if calls == 3:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(StreamingEngine, "step", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    assert caught.value.exit_status == status
    assert calls == 3
    assert signal.getsignal(number) == before
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == (1, 2, 2)
    monkeypatch.undo()
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))


@pytest.mark.parametrize(
    ("computing", "call", "slow", "done"),
    [("step", 3, 4, (1, 2, 2)), ("predict", 1, 7, (3, 5, 5))],
    ids=["training", "validation"],
)
def test_a_signal_saves_before_the_slide_that_is_read_ahead_is_there(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    computing: str,
    call: int,
    slow: int,
    done: tuple[int, int, int],
) -> None:
    """The ``slow``-th slide to be opened, while the one before is computed on, is not there before the state is saved."""
    open_view, compute, save = ViewSource.open, getattr(StreamingEngine, computing), Trainer.save
    reading, saved = threading.Event(), threading.Event()
    opened, calls, in_time = 0, 0, False

    def waits(self: ViewSource, entry: Entry, draws: Any = None) -> SlideView:
        nonlocal opened, in_time
        opened += 1
        if opened == slow:
            reading.set()
            in_time = saved.wait(timeout=5)
        return open_view(self, entry, draws)

    def signalled(self: StreamingEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            assert reading.wait(timeout=20)
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, *args, **kwargs)

    def told(self: Trainer) -> None:
        save(self)
        if reading.is_set():
            saved.set()

    monkeypatch.setattr(ViewSource, "open", waits)
    monkeypatch.setattr(StreamingEngine, computing, signalled)
    monkeypatch.setattr(Trainer, "save", told)
    with pytest.raises(Interrupted):
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    assert in_time
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == done


def test_a_signal_in_validation_saves_the_trained_epoch(
    manifest: Path, tmp_path: Path, whole_run: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = StreamingEngine.predict

    def signalled(self: StreamingEngine, view: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, view, **kwargs)

    monkeypatch.setattr(StreamingEngine, "predict", signalled)
    with pytest.raises(Interrupted):
        train(tiny_config(manifest, tmp_path / "stopped"))
    monkeypatch.undo()
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["epoch"]) == (3, 5, 0)
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))


@pytest.mark.parametrize("failure", [SlideError, StoreError])
@pytest.mark.parametrize(("in_validation", "done"), [(False, (1, 2, 2)), (True, (3, 5, 5))])
def test_a_slide_or_a_disk_that_fails_saves_what_was_done(
    manifest: Path,
    tmp_path: Path,
    whole_run: Whole,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    in_validation: bool,
    done: tuple[int, int, int],
    failure: type[WholeslideError],
) -> None:
    """The fourth slide that is trained on, in the middle of a group, or the first of the validation."""
    open_view, opened = ViewSource.open, 0

    def unreadable(self: ViewSource, entry: Entry, draws: Any = None) -> SlideView:
        nonlocal opened
        opened += 1
        if draws is None if in_validation else opened == 4:
            raise failure.single("cannot be read", where=entry.file, remedy="copy it again")
        return open_view(self, entry, draws)

    monkeypatch.setattr(ViewSource, "open", unreadable)
    with pytest.raises(failure, match="cannot be read"):
        train(tiny_config(manifest, tmp_path / "stopped", checkpoint_minutes=60))
    monkeypatch.undo()
    record = json.loads((tmp_path / "stopped" / "checkpoints" / "last.json").read_text())
    assert (record["step"], record["state"]["position"], record["state"]["slides_seen"]) == done
    assert f"saved after step {done[0]}, go on with --resume when it is mended" in caplog.messages
    train(tiny_config(manifest, tmp_path / "stopped", resume=True))
    assert_same_end(tmp_path / "stopped", whole_run("simultaneous"))
