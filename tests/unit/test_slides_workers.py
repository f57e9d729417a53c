"""Workers that hang, that a copy of the process must not share, that an interrupt must not lose, and files that change."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from wholeslide.errors import ConfigError, SlideError
from wholeslide.geometry import Box
from wholeslide.slides import opening, workers
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import SlideReader
from wholeslide.slides.slide_file import SlideFile
from wholeslide.slides.workers import Worker, Workers

#: A worker in which the method {} of readers of some file never comes back.
HANGING = """
import time
from wholeslide.slides.image_reader import ImageReader
plain = ImageReader.{}
def hang(self, *arguments):
    if "hang" in self.path.name:
        time.sleep(3600)
    return plain(self, *arguments)
ImageReader.{} = hang
from wholeslide.slides.worker import serve
serve({{}})
"""
#: A worker that begins to say what it has read, says no more for a while, and ends.
FALTERING = """
import os, struct, time
from multiprocessing.connection import Connection
plain = Connection.send
def falter(self, answer):
    if isinstance(answer, tuple):
        os.write(self.fileno(), struct.pack("!i", 1000) + b"some of it")
        time.sleep(15)
        os._exit(0)
    plain(self, answer)
Connection.send = falter
from wholeslide.slides.worker import serve
serve({})
"""
PART = Box(0, 0, 9, 9)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Two workers of this test alone."""
    found = Workers(2)
    monkeypatch.setattr(opening, "decoding_processes", lambda: found)
    yield found
    found.end()


@contextmanager
def impatient() -> Iterator[None]:
    """A block in which an answer has to come within two seconds; a busy machine needs more to start a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_PATIENCE_SECONDS", 2.0)
        patch.setattr(workers, "_LOOK_SECONDS", 0.1)
        patch.setattr(workers, "_ENDING_SECONDS", 2.0)
        yield


def grey(path: Path, level: int = 90, side: int = 64) -> Path:
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)
    return path


def apart(path: Path) -> SlideReader:
    return open_slide(path, decoders="processes")


def started(pool: Workers) -> list[Worker]:
    return [worker for worker in pool._idle.queue if worker is not None]


FORKING = """
import os, signal, sys
from pathlib import Path
from wholeslide.geometry import Box
from wholeslide.slides.opening import open_slide
from wholeslide.slides.workers import decoding_processes

def pids():
    return {worker.process.pid for worker in decoding_processes()._idle.queue if worker is not None}

dark, light = (open_slide(Path(path), decoders="processes") for path in sys.argv[1:])
before = pids()
assert len(before) == 1, before
child = os.fork()
signal.alarm(60)
mine, level = (light, 200) if child else (dark, 10)
wrong = sum(not (mine.read_level(0, Box(0, 0, 64, 64)) == level).all() for _ in range(100))
shared = before & pids()
mine.close()
if not child:
    os._exit(10 * bool(wrong) + bool(shared))
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
light_again = open_slide(Path(sys.argv[2]), decoders="processes")
assert pids() == before, "the parent keeps its worker"
sys.exit(f"{wrong} wrong answers, and {status} in the child" if wrong or status else 0)
"""


def test_a_copy_of_the_process_has_workers_of_its_own(tmp_path: Path) -> None:
    """Both ask at the same time: over one connection each would get the other's pixels."""
    paths = [grey(tmp_path / "dark.png", 10), grey(tmp_path / "light.png", 200)]
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *map(str, paths)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


LEAVING = """
import os, sys
from pathlib import Path
from wholeslide.slides.opening import open_slide
from wholeslide.slides.workers import decoding_processes

reader = open_slide(Path(sys.argv[1]), decoders="processes")
(worker,) = (worker for worker in decoding_processes()._idle.queue if worker is not None)
told, tell = os.pipe()
if not os.fork():
    os.close(tell)
    os.read(told, 1)  # until the other has ended
    os._exit(0)
sys.exit(worker.end())
"""


def test_a_copy_does_not_keep_the_workers_of_its_parent_alive(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LEAVING, str(grey(tmp_path / "a.png"))]
    assert subprocess.run(words, check=False, timeout=60).returncode == 0, "it sees that its connection has ended"


def test_workers_end_with_the_process_that_asked_them(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from wholeslide.slides.opening import open_slide\n"
    program += "open_slide(Path(sys.argv[1]), decoders='processes')\n"
    program += "from wholeslide.slides import workers; print(*(w.process.pid for w in workers._WORKERS))"
    words = [sys.executable, "-W", "always::ResourceWarning", "-c", program, str(grey(tmp_path / "a.png"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert not psutil.pid_exists(int(done.stdout)), "it was waited for"


def test_a_decoder_that_hangs_costs_its_slide_only(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", HANGING.format("_decode", "_decode"))
    good, bad = grey(tmp_path / "good.png"), grey(tmp_path / "hang.png")
    with closing(apart(good)) as reader, closing(apart(bad)) as broken:
        (worker,) = started(pool)
        with pytest.raises(SlideError) as caught, impatient():
            broken.read_level(0, PART)
        assert str(caught.value).startswith(
            f"its decoder gave no answer within 2 s, and was ended ({bad}): see whether the disk that it lies on answers"
        )
        assert worker.process.returncode == -signal.SIGKILL
        assert (reader.read_level(0, PART) == 90).all()


def test_a_decoder_that_stops_in_the_middle_of_an_answer_is_ended(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", FALTERING)
    path = grey(tmp_path / "a.png")
    with closing(apart(path)) as reader:
        (worker,) = started(pool)
        with pytest.raises(SlideError) as caught, impatient():
            reader.read_level(0, PART)
        assert str(caught.value).startswith(f"its decoder gave no answer within 2 s, and was ended ({path})")
        assert worker.process.returncode == -signal.SIGKILL
        monkeypatch.undo()
        monkeypatch.setattr(opening, "decoding_processes", lambda: pool)
        assert (reader.read_level(0, PART) == 90).all()


def test_an_answer_that_takes_many_looks_is_waited_for(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", HANGING.replace("3600", "0.5").format("_decode", "_decode"))
    with closing(apart(grey(tmp_path / "hang.png"))) as reader, impatient():
        monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 60.0)
        assert (reader.read_level(0, PART) == 90).all()


def test_a_slide_whose_closing_hangs_is_given_up(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was read of it was read: that is no error."""
    monkeypatch.setattr(workers, "_PROGRAM", HANGING.format("_release", "_release"))
    good, bad = grey(tmp_path / "good.png"), grey(tmp_path / "hang.png")
    with closing(apart(good)) as reader:
        broken = apart(bad)
        with caplog.at_level(logging.WARNING), impatient():
            broken.close()
        assert caplog.messages == [f"{bad}: its decoder did not close it within 2 s, and was ended"]
        assert started(pool) == []
        assert (reader.read_level(0, PART) == 90).all()


def test_a_worker_that_does_not_start(pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", "import time; time.sleep(3600 + {})")
    before = set(psutil.Process().children())
    told = r"did not start within 2 s \(--decoders\): .* --decoders threads"
    with pytest.raises(ConfigError, match=told), impatient():
        apart(grey(tmp_path / "a.png"))
    assert set(psutil.Process().children()) <= before


def test_a_worker_that_does_not_end_is_ended(pool: Workers, tmp_path: Path) -> None:
    reader = apart(grey(tmp_path / "a.png"))
    (worker,) = started(pool)
    worker.process.send_signal(signal.SIGSTOP)
    with impatient():
        assert worker.end() == -signal.SIGKILL
    reader.close()


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_an_interrupt_while_a_slide_is_closed_loses_no_worker(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    first = apart(grey(tmp_path / "a.png"))
    busy = pool._idle.get_nowait()
    second = apart(grey(tmp_path / "b.png", 200))  # by the other worker
    pool._idle.put(busy)
    assert len(started(pool)) == 2
    receive, heard = Connection.recv, 0

    def interrupted(self: Connection) -> Any:
        nonlocal heard
        heard += 1
        if heard == interrupted_at:
            raise KeyboardInterrupt
        return receive(self)

    monkeypatch.setattr(Connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.close()
    monkeypatch.setattr(Connection, "recv", receive)
    assert (pool._idle.qsize(), len(started(pool))) == (2, 1)
    assert (second.read_level(0, PART) == 200).all()


def end_workers(pool: Workers) -> None:
    for worker in started(pool):
        worker.process.kill()


def test_a_file_that_changed_is_not_opened_again(pool: Workers, tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png")
    with closing(apart(path)) as reader:
        assert (reader.read_level(0, PART) == 90).all()
        end_workers(pool)
        with pytest.raises(SlideError, match="its decoder crashed"):
            reader.read_level(0, PART)
        assert (reader.read_level(0, PART) == 90).all(), "the same file is opened again"
        grey(path, 200)
        os.utime(path, ns=(5, 5))  # in a file's times there may be no difference of a moment
        assert (reader.read_level(0, PART) == 90).all(), "who has it open goes on"
        end_workers(pool)
        with pytest.raises(SlideError, match="its decoder crashed"):
            reader.read_level(0, PART)
        with pytest.raises(SlideError) as caught:
            reader.read_level(0, PART)
        assert str(caught.value).startswith(f"the file was changed or removed while it was read ({path}): begin again")
        path.unlink()
        with pytest.raises(SlideError, match="was changed or removed"):
            reader.read_level(0, PART)


def test_a_file_that_changes_while_it_is_opened_is_refused(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first look at it, before the reader has it."""
    program = """
import os
from wholeslide.slides import worker
opened = worker.open_here
def late(path, *, fast):
    os.utime(path, ns=(5, 5))
    return opened(path, fast=fast)
worker.open_here = late
worker.serve({})
"""
    monkeypatch.setattr(workers, "_PROGRAM", program)
    with pytest.raises(SlideError, match="was changed or removed while it was read"):
        apart(grey(tmp_path / "a.png"))


def test_what_makes_a_slide_another_one(tmp_path: Path) -> None:
    path = grey(tmp_path / "a.png")
    seen = SlideFile.of(path, fast=True)
    moved = path.rename(tmp_path / "old.png")
    path.write_bytes(moved.read_bytes())
    os.utime(path, ns=(seen.content[0][0],) * 2)
    assert SlideFile.of(path, fast=True) != seen, "another file, though of the same time and size"
    seen.check()  # a network drive may give the same file another inode
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(SlideError, match="was changed"):
        seen.check()


def test_a_folder_s_slide_is_its_dicom_files(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"level")
    seen = SlideFile.of(tmp_path, fast=True)
    (tmp_path / "thumbnails").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    seen.check()
    (tmp_path / "2.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"level")
    with pytest.raises(SlideError, match="was changed"):
        seen.check()
