"""Slides whose classes differ only in the distance of like objects: nothing else tells them apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from wholeslide.baselines.patches import patch_boxes
from wholeslide.demo.distance import (
    JITTER_PX,
    LEAST_DISTANCE_PX,
    PATCH_PX,
    RADIUS_PX,
    DistanceCohortConfig,
    draw_centres,
    draw_images,
    write_distance_cohort,
)
from wholeslide.geometry import Size

CONFIG = DistanceCohortConfig(train_pairs=2, valid_pairs=1, test_pairs=1, side_px=2048)


def distances(points: np.ndarray) -> list[float]:
    return sorted(float(np.hypot(*(one - other))) for one, other in itertools.combinations(points, 2))


def test_only_the_distances_differ() -> None:
    for seed in range(50):
        found = draw_centres(CONFIG, np.random.default_rng(seed))
        near = {name: sum(each < 1.2 * CONFIG.distance_px for each in distances(found[name])) for name in found}
        assert near == {"apart": 0, "paired": 2}
        middle = sum(found.values()) / 2
        assert middle.shape == (4, 2)


def test_single_objects_are_distributed_alike() -> None:
    """About the lattice's centre the radii are the same; the turn, the mirror and the shift are drawn for both."""
    for seed in range(20):
        found = draw_centres(CONFIG, np.random.default_rng(seed))
        centres = {name: points.mean(axis=0) for name, points in found.items()}
        np.testing.assert_allclose(centres["apart"], centres["paired"], atol=1e-9)
        radii = [np.sort(np.hypot(*(found[name] - centres[name]).T)) for name in found]
        np.testing.assert_allclose(*radii, atol=3 * JITTER_PX)


def test_no_patch_touches_two_objects() -> None:
    for seed in range(30):
        for points in draw_centres(CONFIG, np.random.default_rng(seed)).values():
            assert distances(points)[0] >= CONFIG.distance_px - 3 * JITTER_PX
            assert points.min() > RADIUS_PX
            assert points.max() < CONFIG.side_px - RADIUS_PX
            for box in patch_boxes(Size(CONFIG.side_px, CONFIG.side_px), PATCH_PX):
                nearest = np.clip(points, (box.left, box.top), (box.left + PATCH_PX, box.top + PATCH_PX))
                assert (np.hypot(*(nearest - points).T) < RADIUS_PX + 1).sum() <= 1


def test_the_slides_of_a_pair_share_their_tissue() -> None:
    images = draw_images(CONFIG, 0)
    same = (images["apart"] == images["paired"]).all(axis=2)
    assert 0.98 < same.mean() < 1
    again = draw_images(CONFIG, 0)
    assert all(np.array_equal(images[name], again[name]) for name in images)
    dark = [int((images[name][..., 1] < 80).sum()) for name in images]
    assert dark[0] == pytest.approx(dark[1], rel=0.01)
    assert dark[0] > 4 * 0.6 * np.pi * RADIUS_PX**2


def test_the_cohort_is_a_manifest_whose_names_do_not_tell(tmp_path: Path) -> None:
    config = DistanceCohortConfig(train_pairs=6, valid_pairs=1, test_pairs=1, seed=1)
    table = pd.read_csv(write_distance_cohort(tmp_path, config))
    assert table["split"].tolist() == ["train"] * 12 + ["valid"] * 2 + ["test"] * 2
    assert table["patient"].is_unique
    letters = table["file"].str[9]
    assert set(letters[table["label"] == "paired"]) == {"a", "b"}
    assert all((tmp_path / file).is_file() for file in table["file"])


def test_objects_that_a_patch_could_relate_are_refused() -> None:
    with pytest.raises(AssertionError, match="a patch may touch two objects"):
        DistanceCohortConfig(distance_px=LEAST_DISTANCE_PX - 1)
    with pytest.raises(AssertionError, match="objects may lie outside"):
        DistanceCohortConfig(distance_px=800)
