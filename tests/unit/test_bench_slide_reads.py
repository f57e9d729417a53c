"""What is timed when a slide is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wholeslide.bench import io_step
from wholeslide.bench.io import IoCase
from wholeslide.bench.pyramid import texture_tiles, write_pyramid
from wholeslide.bench.slide_reads import SlideReads, open_reads
from wholeslide.geometry import Box, Size
from wholeslide.slides.fast_reader import FastReader

SIZE, MPP = Size(1400, 1060), 8.0


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.svs"
    write_pyramid(path, SIZE, texture_tiles(None, seed=0), seed=0)
    return path


def case(slide: Path, reader: str) -> IoCase:
    return IoCase(
        path=str(slide), width=SIZE.width, height=SIZE.height, format="jpeg", reader=reader, threads=1, mpp=MPP
    )


def test_a_coarse_slide_is_decoded_while_it_is_timed(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its level of 4 microns, of 700x530 pixels, are 3x3 tiles, which the thumbnail of the opening needs too."""
    decoded: list[object] = []
    plain, read_all = FastReader._decoded, io_step._read_all

    def noted(self: FastReader, key: tuple[int, ...]) -> np.ndarray:
        decoded.append(key)
        return plain(self, key)  # type: ignore[arg-type]

    def timed(reads: SlideReads, boxes: list[Box], threads: int) -> None:
        assert decoded, "by the opening"
        decoded.clear()
        read_all(reads, boxes, threads)
        assert len(set(decoded)) == len(decoded) == 9

    monkeypatch.setattr(FastReader, "_decoded", noted)
    monkeypatch.setattr(io_step, "_read_all", timed)
    assert io_step.measure(case(slide, "fast"))["width"] == 350


@pytest.mark.parametrize("reader", ["fast", "openslide-region", "openslide-patch"])
def test_what_is_read_is_the_same_after_forgetting(slide: Path, reader: str) -> None:
    reads, box = open_reads(reader, slide, MPP), Box(10, 20, 200, 150)
    before = reads.read(box)
    reads.forget()
    np.testing.assert_array_equal(reads.read(box), before)
    reads.close()
