"""The classes of the demonstration differ in the arrangement and in nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import maximum_filter, minimum_filter
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist

from wholeslide.demo.arrangement import (
    ARRANGEMENTS,
    EDGE_PX,
    LARGEST_SEMI_AXIS_PX,
    OBJECT_DISTANCE_PX,
    PATCH_PX,
    Arrangement,
)
from wholeslide.demo.cohort import draw_pairs
from wholeslide.demo.staining import Specimen, draw_specimen

SIZES = [(600, 680), (1060, 1400)]


def specimen(seed: int, tissue_px: tuple[int, int] = SIZES[0]) -> Specimen:
    return draw_specimen(np.random.default_rng(seed), tissue_px=tissue_px)


def objects_by_pixel(slide: Specimen, arrangement: Arrangement) -> np.ndarray:
    """(height, width): 1 + the number of the object that colours a pixel, 0 for none."""
    rows, columns = np.mgrid[: slide.size.height, : slide.size.width]
    owner = np.zeros((slide.size.height, slide.size.width), dtype=int)
    for number, (x, y) in enumerate(slide.layout.px_centres[arrangement] + slide.px_origin):
        owner[np.hypot(columns - x, rows - y) <= LARGEST_SEMI_AXIS_PX + EDGE_PX] = number + 1
    return owner


@pytest.mark.parametrize("tissue_px", SIZES)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_objects_keep_their_distance(arrangement: Arrangement, tissue_px: tuple[int, int]) -> None:
    """Any two points of a patch are at most its diagonal apart, so none touches two objects."""
    for seed in range(10):
        px_centres = specimen(seed, tissue_px).layout.px_centres[arrangement]
        assert pdist(px_centres).min() >= OBJECT_DISTANCE_PX


def some_patch_touches_two(owner: np.ndarray, side_px: int) -> bool:
    """Brute force over every patch at every offset."""
    highest = maximum_filter(owner, side_px, mode="constant")
    lowest = minimum_filter(
        np.where(owner == 0, owner.max() + 1, owner), side_px, mode="constant", cval=owner.max() + 1
    )
    return bool(((highest > 0) & (lowest != highest)).any())


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_no_patch_touches_two_objects(arrangement: Arrangement) -> None:
    owner = objects_by_pixel(specimen(3), arrangement)
    assert not some_patch_touches_two(owner, PATCH_PX)
    assert some_patch_touches_two(owner, 3 * PATCH_PX)


def neighbours_within(px_centres: np.ndarray, radius_px: float) -> float:
    """Mean number of other objects around an object."""
    return float(np.mean([len(found) - 1 for found in cKDTree(px_centres).query_ball_point(px_centres, radius_px)]))


def test_rings_and_discs_differ_in_a_window_that_sees_several_objects() -> None:
    for seed in range(5):
        layout = specimen(seed).layout
        moved = (layout.px_centres["ring"] != layout.px_centres["disc"]).any(axis=1)
        ring, disc = (neighbours_within(layout.px_centres[name][moved], 120) for name in ("ring", "disc"))
        assert disc > 1.8 * ring


@pytest.mark.parametrize("tissue_px", SIZES)
def test_every_slide_has_a_group(tissue_px: tuple[int, int]) -> None:
    for slide in draw_pairs(20, seed=1, tissue_px=tissue_px):
        layout = slide.layout
        assert (layout.px_centres["ring"] != layout.px_centres["disc"]).any()


def test_the_two_slides_of_a_pair_are_equal_but_for_the_objects() -> None:
    slide = specimen(4)
    images = slide.render()
    background = (objects_by_pixel(slide, "ring") == 0) & (objects_by_pixel(slide, "disc") == 0)
    assert (images["ring"][background] == images["disc"][background]).all()
    assert (images["ring"] != images["disc"]).any()
    colours = [images[name].reshape(-1, 3).mean(axis=0) for name in ARRANGEMENTS]
    assert np.abs(colours[0] - colours[1]).max() < 0.1


def test_stains_vary_between_pairs() -> None:
    colours = [specimen(seed).render()["ring"].mean(axis=(0, 1)) for seed in range(6)]
    assert np.std(colours, axis=0).min() > 2


def test_the_objects_lie_in_the_tissue() -> None:
    for seed in range(10):
        slide = specimen(seed)
        high = slide.px_outline.max(axis=0)
        for px_centres in slide.layout.px_centres.values():
            assert (px_centres > 0).all()
            assert (px_centres < high).all()


def test_a_seed_draws_the_same_again_and_another_does_not() -> None:
    first, again, other = specimen(5).render(), specimen(5).render(), specimen(6).render()
    assert all((first[name] == again[name]).all() for name in ARRANGEMENTS)
    assert first["ring"].shape != other["ring"].shape or (first["ring"] != other["ring"]).any()


def test_a_pair_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = [list(draw_pairs(count, seed=2, tissue_px=SIZES[0])) for count in (2, 4)]
    assert [slide.texture_seed for slide in few] == [slide.texture_seed for slide in many[:2]]
