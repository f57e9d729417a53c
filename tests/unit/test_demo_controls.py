"""The controls fail on the arrangement, and would not fail on a leak."""

from __future__ import annotations

import numpy as np
import pytest

from wholeslide.demo.arrangement import PATCH_PX
from wholeslide.demo.controls import (
    ControlSlides,
    _patches,
    describe_slides,
    histogram_auroc,
    patch_auroc,
    render_small,
)

PAIRS = 20


@pytest.fixture(scope="module")
def drawn() -> tuple[list[np.ndarray], list[int], list[int]]:
    return render_small(0, pairs=PAIRS)


def leaky(drawn: tuple[list[np.ndarray], list[int], list[int]], *, spots: int, darker: int) -> ControlSlides:
    """The same slides, where those of class 1 are a little darker, or have pairs of dark squares that touch."""
    images, labels, pairs = drawn
    changed = []
    for image, label in zip(images, labels, strict=True):
        copy = image.copy()
        rng = np.random.default_rng(0)
        for row, column in rng.integers(100, 500, (spots, 2)):
            apart = 0 if label else 40
            copy[row : row + 6, column : column + 6] = 60
            copy[row : row + 6, column + 7 + apart : column + 13 + apart] = 60
        changed.append(np.clip(copy.astype(int) - darker * label, 0, 255).astype(np.uint8))
    return describe_slides(changed, labels, pairs, seed=0)


def test_both_controls_fail_on_the_arrangement(drawn: tuple[list[np.ndarray], list[int], list[int]]) -> None:
    slides = describe_slides(*drawn, seed=0)
    assert 0.3 <= histogram_auroc(slides) <= 0.7
    assert 0.3 <= patch_auroc(slides, seed=0) <= 0.7


def test_the_histogram_control_sees_a_difference_in_colour(
    drawn: tuple[list[np.ndarray], list[int], list[int]],
) -> None:
    assert histogram_auroc(leaky(drawn, spots=0, darker=25)) > 0.9


def test_the_patch_control_sees_a_difference_inside_patches(
    drawn: tuple[list[np.ndarray], list[int], list[int]],
) -> None:
    """Touching squares against squares apart: the same colours, told apart by what lies in one patch."""
    slides = leaky(drawn, spots=30, darker=0)
    assert patch_auroc(slides, seed=0) > 0.9


def test_twins_share_a_fold(drawn: tuple[list[np.ndarray], list[int], list[int]]) -> None:
    _, labels, pairs = drawn
    assert labels == [0, 1] * PAIRS
    assert pairs == [number for number in range(PAIRS) for _ in range(2)]


def test_patches_cover_the_image_along_a_grid() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2 * PATCH_PX, PATCH_PX + 3, 3), np.uint8)
    patches = _patches(image)
    assert patches.shape == (4, 3 * PATCH_PX**2)
    np.testing.assert_allclose(patches[1], image[:PATCH_PX, 3:].reshape(-1) / 255, rtol=1e-6)
    np.testing.assert_allclose(patches[2], image[PATCH_PX:, :PATCH_PX].reshape(-1) / 255, rtol=1e-6)
