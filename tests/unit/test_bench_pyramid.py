"""Slides as a scanner at 40x writes them: sizes, levels, tissue, and tiles that decode to the texture."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from slides_cases import real_file

from wholeslide.bench.pyramid import FORMATS, TILE_PX, texture_tiles, write_pyramid
from wholeslide.errors import SlideError
from wholeslide.geometry import Box, Mpp, Size
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.fast_reader import FastReader
from wholeslide.slides.opening import open_slide
from wholeslide.slides.readers import Pixels
from wholeslide.slides.working import open_working_slide

SIZE = Size(701, 523)
#: Mean difference, of 255, that compression of noise leaves; another pattern, or wrong colours, make several times as much.
SAME_TEXTURE = 10


def block_means(pixels: Pixels, side: int) -> npt.NDArray[np.float64]:
    height, width, channels = pixels.shape
    means: npt.NDArray[np.float64] = pixels.reshape(height // side, side, width // side, side, channels).mean((1, 3))
    return means


@pytest.mark.parametrize("stored_as", FORMATS)
def test_levels_and_tiles(stored_as: str, tmp_path: Path) -> None:
    patterns = texture_tiles(None, seed=0)[:1]
    path = tmp_path / "slide.svs"
    write_pyramid(path, SIZE, patterns, seed=0, stored_as=stored_as)
    with closing(open_slide(path)) as reader:
        assert isinstance(reader, FastReader)
        assert (reader.vendor, reader.l0_mpp) == ("aperio", Mpp(0.25, 0.25))
        assert [str(level.size) for level in reader.levels] == ["5608x4184", "1402x1046", "351x262"]
        assert [level.downsample for level in reader.levels] == [1, 4, 16]
        assert all(1 in reader.reductions(level) for level in range(3))
        for column in range(2):
            tile = reader.read_level(1, Box(column * TILE_PX, TILE_PX, TILE_PX, TILE_PX)).astype(np.int16)
            assert np.abs(tile - patterns[0]).mean() < SAME_TEXTURE
        fine, coarse = (reader.read_level(1, Box(0, 0, 1376, 1024)), reader.read_level(2, Box(0, 0, 344, 256)))
        assert np.abs(block_means(fine, 32) - block_means(coarse, 8)).mean() < 2


def test_level_0_is_one_tile_in_many_places(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_pyramid(path, Size(4000, 3000), texture_tiles(None, seed=0), seed=0, tissue_fraction=0.01)
    with tifffile.TiffFile(path) as file:
        assert len(file.pages.first.dataoffsets) == 125 * 94
        assert len(set(file.pages.first.dataoffsets)) == 1
    with closing(open_slide(path)) as reader:
        assert not np.ptp(reader.read_level(0, Box(5000, 20000, 700, 700)), axis=(0, 1)).any()


def test_the_tissue_covers_its_part(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "slide.svs", Size(1500, 1200), texture_tiles(None, seed=0), seed=0, tissue_fraction=0.3)
    with closing(open_working_slide(tmp_path / "slide.svs", SlideConfig())) as slide:
        assert slide.whole_size == Size(1500, 1200)
        assert slide.tissue_fraction == pytest.approx(0.3, abs=0.03)
        assert (slide.sampling.level, slide.sampling.reduction) == (1, 2)
        assert (slide.read_whole(Box(0, 0, 200, 200)) == 255).all()


def test_one_seed_is_one_file(tmp_path: Path) -> None:
    for name, seed in (("a.svs", 1), ("b.svs", 1), ("c.svs", 2)):
        write_pyramid(tmp_path / name, SIZE, texture_tiles(None, seed=seed), seed=seed, tissue_fraction=0.5)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.svs", "b.svs", "c.svs"))
    assert first == again != other


def test_texture_of_a_slide_is_its_tissue() -> None:
    tiles = texture_tiles(real_file("slides/cmu_small_region.svs"), seed=0)
    assert {tile.shape for tile in tiles} == {(TILE_PX, TILE_PX, 3)}
    assert len({tile.tobytes() for tile in tiles}) == len(tiles) > 24
    assert all(np.ptp(tile.mean(axis=(0, 1))) > 10 for tile in tiles)


def test_a_slide_smaller_than_a_tile_has_no_texture(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "slide.svs", Size(100, 100), texture_tiles(None, seed=0), seed=0)
    with pytest.raises(
        SlideError, match=r"only 200x200 pixels .*: take the texture from a slide of at least 256 a side"
    ):
        texture_tiles(tmp_path / "slide.svs", seed=0)
