"""Tiles that are decoded directly and reduced, against the slow readers of the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from slides_cases import real_file, tissue_image, write_ome

from wholeslide.errors import SlideError
from wholeslide.geometry import Box, Size
from wholeslide.slides import fast_reader
from wholeslide.slides.codecs import Jpeg
from wholeslide.slides.fast_reader import FastReader
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import Pixels, SlideReader
from wholeslide.slides.resample import AxisMap, Resampling
from wholeslide.slides.scale import sample_at
from wholeslide.slides.stored_tiles import REDUCTIONS
from wholeslide.slides.tile_layouts import find_stored_tiles

Opener = Callable[[Path], FastReader]

RATIOS = (1, 2, 4, 8, 2.5, 3, 5.3, 10)
#: tifffile compresses red, green and blue as luminance and chrominances, unless it is told otherwise.
LAYOUTS: dict[str, dict[str, Any]] = {
    "rgb": {"compression": "jpeg", "compressionargs": {"outcolorspace": "RGB"}},
    "ycbcr": {"compression": "jpeg", "subsampling": (1, 1)},
    "ycbcr-422": {"compression": "jpeg", "subsampling": (2, 1)},
    "ycbcr-420": {"compression": "jpeg", "subsampling": (2, 2)},
    "jpeg2000": {"compression": "jpeg2000", "compressionargs": {"level": 40}},
}


def written(path: Path, layout: str, *, width: int = 701, height: int = 523, tile: int = 64) -> Path:
    """A slide of two levels with last tiles that reach over the edges."""
    image = tissue_image(width, height)
    options = {"tile": (tile, tile), "photometric": "rgb", "metadata": None, **LAYOUTS[layout]}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
        writer.write(np.ascontiguousarray(image[::4, ::4]), subfiletype=1, **options)
    return path


@pytest.fixture
def fast() -> Iterator[Opener]:
    """Opens a slide and closes it after the test."""
    with ExitStack() as opened:

        def open_fast(path: Path) -> FastReader:
            reader = opened.enter_context(closing(open_slide(path)))
            assert isinstance(reader, FastReader), type(reader)
            return reader

        yield open_fast


def averaged(reader: SlideReader, level: int, ratio: float, reduction: int) -> Pixels:
    """A whole level, area-averaged from pixels that are reduced while they are decoded."""
    size = reader.levels[level].size
    axis = AxisMap(0, ratio / reduction)
    resampling, px_box = Resampling(axis, axis), Box(0, 0, int(size.width / ratio), int(size.height / ratio))
    level_hwc = reader.read_level(level, resampling.level_box(px_box), reduction=reduction)
    return resampling.average(level_hwc, px_box)


def psnr(one: Pixels, other: Pixels) -> float:
    """In decibels, of a peak of 255."""
    squared = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * float(np.log10(255**2 / max(squared, 1e-9)))


def check_against_area_average(reader: FastReader) -> set[int]:
    """Every level, at every ratio: at least 35 dB; returns the reductions that were taken."""
    taken = set()
    for level, stored in enumerate(reader.levels):
        for ratio in RATIOS:
            if min(stored.size.width, stored.size.height) < 8 * ratio:
                continue
            reduction = reader.reduction_for(level, ratio, ratio)
            reference = averaged(reader.plain, level, ratio, 1)
            pixels = averaged(reader, level, ratio, reduction)
            edges = [slice(None), np.s_[-1:], np.s_[:, -1:]]
            assert min(psnr(pixels[edge], reference[edge]) for edge in edges) >= 35, (level, ratio, reduction)
            taken.add(reduction)
    return taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_pyramids_are_read_as_by_area_averaging(fast: Opener, tmp_path: Path, layout: str) -> None:
    with_reader = fast(written(tmp_path / "slide.tif", layout))
    taken = check_against_area_average(with_reader)
    assert taken == ({1, 2} if layout == "jpeg2000" else {1, 2, 4, 8})


@pytest.mark.parametrize("name", ["cmu_small_region.svs", "fluorescence-dapi.ndpi", "dicom-wsi.dcm"])
def test_real_slides_are_read_as_by_area_averaging(fast: Opener, name: str) -> None:
    reader = fast(real_file(f"slides/{name}"))
    assert check_against_area_average(reader) == {1, 2, 4, 8}


def test_levels_in_subifds_are_found(fast: Opener, tmp_path: Path) -> None:
    path = write_ome(tmp_path / "slide.ome.tif", tissue_image(640, 512), compression="jpeg")
    reader = fast(path)
    assert reader.reductions(0)
    assert reader.reductions(1)


def test_a_pixel_does_not_depend_on_the_box(fast: Opener, tmp_path: Path) -> None:
    reader = fast(written(tmp_path / "slide.tif", "ycbcr-420"))
    whole = reader.read_level(0, Box(0, 0, 351, 262), reduction=2)
    for reduced_box in (Box(0, 0, 1, 1), Box(30, 31, 5, 3), Box(340, 250, 11, 12), Box(17, 100, 200, 99)):
        pixels = reader.read_level(0, reduced_box, reduction=2)
        np.testing.assert_array_equal(pixels, whole[reduced_box.rows_columns])


def test_what_lies_beyond_the_edge_is_not_averaged_in(fast: Opener, tmp_path: Path) -> None:
    """An encoder may fill the last tiles with anything: here with black."""
    image = np.full((500, 700, 3), 255, np.uint8)
    image[:30, :30] = tissue_image(30, 30)
    padded = np.zeros((512, 704, 3), np.uint8)
    padded[:500, :700] = image
    tiles = [padded[top : top + 64, left : left + 64] for top in range(0, 512, 64) for left in range(0, 704, 64)]
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        writer.write(
            iter(tiles), shape=image.shape, dtype=np.uint8, tile=(64, 64), photometric="rgb", compression="jpeg"
        )
    reader = fast(tmp_path / "slide.tif")
    for reduction in REDUCTIONS:
        last_row = reader.read_level(0, Box(100 // reduction, -(-500 // reduction) - 1, 32, 1), reduction=reduction)
        assert last_row.min() >= 215, reduction  # 8 black rows of a mean of 8 would make it 128


class _Swapped(Jpeg):
    """Blue for red."""

    def decode(self, data: bytes, size: Size, reduction: int) -> Pixels:
        return super().decode(data, size, reduction)[..., ::-1]


@pytest.mark.parametrize("fault", ["colours", "order", "shape"])
def test_a_wrong_claim_is_found_out(tmp_path: Path, fault: str) -> None:
    path = written(tmp_path / "slide.tif", "rgb")
    found = find_stored_tiles(path)
    first = found[0]
    wrong = {
        "colours": replace(first, codec=_Swapped()),
        "order": replace(first, offsets=first.offsets[::-1], lengths=first.lengths[::-1]),
        "shape": replace(first, tile=Size(128, 32), offsets=first.offsets[:102], lengths=first.lengths[:102]),
    }[fault]
    plain = open_slide(path, fast=False)
    with closing(FastReader(plain, [wrong, *found[1:]])) as reader:
        assert reader.reductions(0) == ()
        assert reader.reductions(1) != ()
        assert reader.reduction_for(0, 8, 8) == 1
        box = Box(100, 100, 90, 80)
        np.testing.assert_array_equal(reader.read_level(0, box), plain.read_level(0, box))


def test_missing_tiles_are_left_to_the_slow_reader(tmp_path: Path) -> None:
    path = written(tmp_path / "slide.tif", "rgb")
    first = find_stored_tiles(path)[0]
    lengths = first.lengths.copy()
    lengths[3] = 0
    with closing(FastReader(open_slide(path, fast=False), [replace(first, lengths=lengths)])) as reader:
        assert reader.reductions(0) == ()


def test_a_damaged_tile_is_an_error_each_time_and_no_other_tile_suffers(fast: Opener, tmp_path: Path) -> None:
    path = written(tmp_path / "slide.tif", "rgb")
    first = find_stored_tiles(path)[0]
    corner = 0
    with path.open("r+b") as file:
        file.seek(int(first.offsets[corner]))
        file.write(bytes(int(first.lengths[corner])))
    reader = fast(path)
    for _ in range(2):
        with pytest.raises(SlideError, match=r"slide\.tif.*copy the file again"):
            reader.read_level(0, Box(0, 0, 100, 100), reduction=2)
        assert reader.read_level(0, Box(40, 40, 100, 100), reduction=2).any()


@pytest.mark.parametrize("reduction", [1, 2, 8])
def test_a_tile_that_only_the_direct_decoder_refuses_is_read_plainly(
    fast: Opener, tmp_path: Path, reduction: int
) -> None:
    """Bytes that belong to nothing, before the mark that ends a tile."""
    image = tissue_image(512, 448)
    tiles = [image[top : top + 64, left : left + 64] for top in range(0, 448, 64) for left in range(0, 512, 64)]
    encoded = [imagecodecs.jpeg8_encode(np.ascontiguousarray(tile), level=90, outcolorspace="RGB") for tile in tiles]
    encoded[3] = encoded[3][:-2] + b"\x12" * 40 + encoded[3][-2:]
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        writer.write(
            iter(encoded),
            shape=image.shape,
            dtype=np.uint8,
            tile=(64, 64),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"outcolorspace": "RGB"},
        )
    reader = fast(tmp_path / "slide.tif")
    assert reduction in reader.reductions(0)
    with pytest.raises(SlideError, match="extraneous bytes"):
        find_stored_tiles(tmp_path / "slide.tif")[0].decode(3, reduction)
    box = Box(192 // reduction, 0, 64 // reduction, 64 // reduction)
    expected = averaged(reader.plain, 0, reduction, 1)[box.rows_columns]
    assert psnr(reader.read_level(0, box, reduction=reduction), expected) > 35


def test_a_damaged_jpeg2000_that_claims_to_be_huge_is_an_error_of_its_slide(fast: Opener, tmp_path: Path) -> None:
    path = written(tmp_path / "slide.tif", "jpeg2000")
    first = find_stored_tiles(path)[0]
    with path.open("r+b") as file:
        file.seek(int(first.offsets[0]))
        tile = file.read(int(first.lengths[0]))
        size = tile.index(b"\xff\x51") + 6  # the marker's length and capabilities, then width and height
        file.seek(int(first.offsets[0]) + size)
        file.write((60_000).to_bytes(4, "big") * 2)
    with pytest.raises(SlideError, match=r"slide\.tif"):
        find_stored_tiles(path)[0].decode(0, 1)


def test_threads_that_cannot_start_are_an_error_and_no_hang(
    fast: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = fast(written(tmp_path / "slide.tif", "rgb"))
    expected = reader.read_level(0, Box(0, 0, 300, 200), reduction=2)
    reader._tiles.clear()
    reader._held_bytes = 0

    class Full:
        """Takes one task, and no more."""

        def __init__(self) -> None:
            self.taken = 0

        def submit(self, work: Callable[..., None], *arguments: Any) -> None:
            self.taken += 1
            if self.taken > 1:
                raise RuntimeError("can't start new thread")
            work(*arguments)

    full = Full()
    monkeypatch.setattr(fast_reader, "decoding_threads", lambda: full)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        reader.read_level(0, Box(0, 0, 300, 200), reduction=2)
    monkeypatch.undo()
    np.testing.assert_array_equal(reader.read_level(0, Box(0, 0, 300, 200), reduction=2), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system copies no processes")
def test_a_copy_of_the_process_reads_too(tmp_path: Path) -> None:
    """As torch's DataLoader makes them; in an interpreter of its own, in which nothing else runs."""
    path = written(tmp_path / "slide.tif", "rgb")
    program = f"""
import os
from pathlib import Path
from wholeslide.geometry import Box
from wholeslide.slides.opening import open_slide
first = open_slide(Path({str(path)!r})).read_level(0, Box(0, 0, 300, 200), reduction=2)
child = os.fork()
if child == 0:
    again = open_slide(Path({str(path)!r})).read_level(0, Box(0, 0, 300, 200), reduction=2)
    os._exit(0 if (first == again).all() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_file_that_was_cut_is_an_error(fast: Opener, tmp_path: Path) -> None:
    path = written(tmp_path / "slide.tif", "rgb")
    reader = fast(path)
    assert reader.reductions(0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(SlideError, match=r"slide\.tif"):
        reader.read_level(0, Box(0, 0, 701, 523))


def test_memory_is_bounded(fast: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_reader, "CACHE_BYTES", 5 * 3 * 32 * 32)
    reader = fast(written(tmp_path / "slide.tif", "rgb"))
    expected = reader.read_level(0, Box(0, 0, 351, 262), reduction=2)
    assert len(reader._tiles) == 5
    assert reader._held_bytes == 5 * 3 * 32 * 32
    np.testing.assert_array_equal(reader.read_level(0, Box(0, 0, 351, 262), reduction=2), expected)


def test_many_threads_read_the_same(fast: Opener, tmp_path: Path) -> None:
    reader = fast(written(tmp_path / "slide.tif", "ycbcr-420"))
    whole = reader.read_level(0, Box(0, 0, 175, 130), reduction=4)
    boxes = [Box(left, top, 40, 40) for left in range(0, 130, 7) for top in range(0, 90, 11)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda box: reader.read_level(0, box, reduction=4), boxes))
    for box, pixels in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(pixels, whole[box.rows_columns])


@pytest.mark.parametrize(
    ("ratio", "reduction"),
    [(1, 1), (1.5, 1), (2, 2), (2.5, 1), (3, 1), (4, 4), (4.5, 2), (6, 2), (7.9, 2), (8, 8), (16, 8), (17.5, 8)],
)
def test_reduced_pixels_lie_whole_in_a_working_pixel_or_are_two_or_more(
    fast: Opener, tmp_path: Path, ratio: float, reduction: int
) -> None:
    reader = fast(written(tmp_path / "slide.tif", "rgb"))
    assert reader.reduction_for(0, ratio, ratio) == reduction


def test_sampling_takes_whole_reductions_near_the_target(fast: Opener, tmp_path: Path) -> None:
    """Level-0 pixels of 0.5 µm: 4.06 of them are taken as 4."""
    reader = fast(written(tmp_path / "slide.tif", "rgb"))
    for downsample, ratio in ((1.01, 1.0), (2.03, 2.0), (3.93, 1.0), (3.9, 3.9), (8.1, 2.0)):
        sampling = sample_at(reader, downsample, downsample, snap=True)
        assert sampling.resampling.x.ratio * sampling.reduction == pytest.approx(ratio)
