"""Slides that are read in processes of their own, and what becomes of a decoder that crashes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
from PIL import Image
from slides_cases import tissue_image, write_pyramid

from wholeslide.errors import ConfigError, SlideError
from wholeslide.geometry import Box, Size
from wholeslide.slides import opening, workers
from wholeslide.slides.fast_reader import FastReader
from wholeslide.slides.isolated_reader import IsolatedReader
from wholeslide.slides.opening import open_slide
from wholeslide.slides.slide_file import SlideFile
from wholeslide.slides.worker import Serving
from wholeslide.slides.workers import Workers

#: A worker in which the decoder of files of some name kills the process.
CRASHING = """
import os, signal
from wholeslide.slides.image_reader import ImageReader
decode = ImageReader._decode
def crash(self, background_rgb):
    if "crash" in self.path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(self, background_rgb)
ImageReader._decode = crash
from wholeslide.slides.worker import serve
serve({})
"""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Two workers of this test alone."""
    found = Workers(2)
    monkeypatch.setattr(opening, "decoding_processes", lambda: found)
    yield found
    found.end()


def picture(path: Path) -> Path:
    Image.fromarray(tissue_image(300, 200)).save(path)
    return path


def test_another_process_reads_the_same(pool: Workers, tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(), compression="jpeg")
    with closing(open_slide(path, decoders="processes")) as apart, closing(open_slide(path)) as here:
        assert isinstance(apart, IsolatedReader)
        assert isinstance(here, FastReader)
        for name in ("vendor", "levels", "l0_mpp", "l0_bounds", "is_plain_image", "description"):
            assert getattr(apart, name) == getattr(here, name), name
        assert apart.reduction_for(0, 2, 2) == here.reduction_for(0, 2, 2) == 2
        for box, reduction in ((Box(0, 0, 100, 90), 1), (Box(-5, 7, 60, 50), 2)):
            np.testing.assert_array_equal(
                apart.read_level(0, box, reduction=reduction), here.read_level(0, box, reduction=reduction)
            )


def test_a_decoder_that_crashes_costs_its_slide_only(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", CRASHING)
    good, bad = picture(tmp_path / "good.png"), picture(tmp_path / "crash.png")
    with (
        closing(open_slide(good, decoders="processes")) as reader,
        closing(open_slide(bad, decoders="processes")) as broken,
    ):
        for _ in range(3):
            with pytest.raises(SlideError) as caught:
                broken.read_level(0, Box(0, 0, 9, 9))
            assert str(caught.value).startswith(f"its decoder crashed (SIGSEGV) ({bad}): convert it")
            assert reader.read_level(0, Box(0, 0, 9, 9)).shape == (9, 9, 3)


def test_errors_of_a_slide_come_through(pool: Workers, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG of another kind")
    with pytest.raises(SlideError, match=r"not an image that any reader knows \(.*a\.png\)"):
        open_slide(tmp_path / "a.png", decoders="processes")
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "b.png", decoders="processes")


def test_an_interrupted_question_is_not_answered_to_another(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "dark.png", tmp_path / "light.png"]
    for path, level in zip(paths, (10, 200), strict=True):
        Image.fromarray(np.full((90, 90, 3), level, np.uint8)).save(path)
    dark, light = (open_slide(path, decoders="processes") for path in paths)
    receive = Connection.recv

    def interrupted(self: Connection) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dark.read_level(0, Box(0, 0, 9, 9))
    monkeypatch.setattr(Connection, "recv", receive)
    assert (light.read_level(0, Box(0, 0, 9, 9)) == 200).all()


def test_a_file_that_was_replaced_is_another(pool: Workers, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for side, level in ((64, 10), (128, 200)):
        Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(tmp_path / "new.png")
        (tmp_path / "new.png").replace(path)
        with closing(open_slide(path, decoders="processes")) as reader:
            assert reader.l0_size == Size(side, side)
            assert (reader.read_level(0, Box(0, 0, 9, 9)) == level).all()


def test_closing_a_slide_closes_it_in_the_workers(pool: Workers, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    first, second = (open_slide(path, decoders="processes") for _ in range(2))
    first.close()
    assert second.read_level(0, Box(0, 0, 9, 9)).shape == (9, 9, 3)
    assert len(pool._opened) == 1
    second.close()
    assert not pool._opened


class Closing:
    """A reader that tells when it is closed."""

    def __init__(self, path: Path, closed: list[Path]) -> None:
        self.path, self._closed = path, closed

    def close(self) -> None:
        self._closed.append(self.path)


def test_a_worker_closes_what_nobody_keeps_open(tmp_path: Path) -> None:
    closed: list[Path] = []
    ours, theirs = Pipe()
    serving = Serving(lambda path, *, fast: Closing(path, closed))
    slides = [SlideFile.of(picture(tmp_path / f"{name}.png"), fast=True) for name in "ab"]
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(serving.run, theirs)
        for slide in slides:
            ours.send((frozenset(slides), slide, "reduction_for", (0, 1, 1)))
            ours.recv()
        ours.send((frozenset(slides[1:]), None, "", ()))
        assert ours.recv() is None
        assert closed == [tmp_path / "a.png"]
        ours.close()
        running.result()


def test_tiles_are_decoded_whole_where_that_is_asked(pool: Workers, tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_image(), compression="jpeg")
    with closing(open_slide(path, decoders="processes", fast=False)) as reader:
        assert reader.reduction_for(0, 4, 4) == 1
    with closing(open_slide(path, decoders="processes")) as reader:
        assert reader.reduction_for(0, 4, 4) == 4


def test_modules_of_the_users_folder_are_not_taken(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with closing(open_slide(picture(tmp_path / "a.png"), decoders="processes")) as reader:
        assert reader.read_level(0, Box(0, 0, 9, 9)).shape == (9, 9, 3)


def test_a_worker_that_cannot_start_is_no_fault_of_the_slide(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", "raise SystemExit({} and 9)")
    with pytest.raises(ConfigError, match=r"cannot be started \(exit status 9\) \(--decoders\): .* --decoders threads"):
        open_slide(picture(tmp_path / "a.png"), decoders="processes")
    monkeypatch.undo()


def test_many_threads_share_two_workers(pool: Workers, tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{number}.png") for number in range(5)]  # more than a worker keeps open
    readers = [open_slide(path, decoders="processes") for path in paths]
    expected = np.asarray(Image.open(paths[0]).convert("RGB"))[10:50, 20:90]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda n: readers[n % 5].read_level(0, Box(20, 10, 70, 40)), range(40)))
    assert all(np.array_equal(pixels, expected) for pixels in found)
    assert len({worker.process.pid for worker in pool._idle.queue if worker is not None}) <= 2


def test_a_worker_that_ends_within_its_answer_has_ended(
    pool: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(_: object) -> None:
        raise OSError("got end of file during message")

    with closing(open_slide(picture(tmp_path / "a.png"), decoders="processes")) as reader:
        monkeypatch.setattr("multiprocessing.connection.Connection.recv", cut_short)
        with pytest.raises(SlideError, match="its decoder crashed"):
            reader.read_level(0, Box(0, 0, 9, 9))
        monkeypatch.undo()


def test_a_worker_ends_with_its_connection(pool: Workers, tmp_path: Path) -> None:
    open_slide(picture(tmp_path / "a.png"), decoders="processes")
    started = [worker for worker in pool._idle.queue if worker is not None]
    assert len(started) == 1
    child = psutil.Process(started[0].process.pid)
    child.send_signal(signal.SIGINT)  # Ctrl-C is for the one that asks
    time.sleep(0.2)
    assert child.is_running()
    assert started[0].end() == 0


@pytest.mark.parametrize(
    ("name", "options", "apart"),
    [
        ("a.png", {}, False),
        ("a.jpg", {}, False),
        ("a.webp", {}, True),
        ("none.tif", {}, False),
        ("deflate.tif", {"compression": "zlib"}, False),
        ("zstd.tif", {"compression": "zstd"}, True),
        ("tiled.tif", {"tile": (64, 64)}, False),
        ("tiled-zstd.tif", {"compression": "zstd", "tile": (64, 64)}, True),
    ],
)
def test_unusual_formats_are_read_apart(
    pool: Workers, tmp_path: Path, name: str, options: dict[str, Any], apart: bool
) -> None:
    path, image = tmp_path / name, tissue_image(200, 150)
    if path.suffix == ".tif":
        tifffile.imwrite(path, image, photometric="rgb", **options)
    else:
        Image.fromarray(image).save(path)
    with closing(open_slide(path)) as reader:
        assert isinstance(reader, IsolatedReader) == apart
        assert reader.read_level(0, Box(0, 0, 200, 150)).shape == (150, 200, 3)
    with closing(open_slide(path, decoders="threads")) as reader:
        assert not isinstance(reader, IsolatedReader)
