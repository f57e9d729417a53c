"""Sizes, boxes and scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wholeslide.errors import ConfigError
from wholeslide.geometry import Box, Mpp, Size

boxes = st.builds(Box, st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 20), st.integers(0, 20))


@pytest.mark.parametrize("text", ["701x623", " 701 x 623 ", "701X623", "701×623"])
def test_size_is_width_by_height(text: str) -> None:
    assert Size.parse(text) == Size(width=701, height=623)


@pytest.mark.parametrize("text", ["", "701", "0x5", "5x0", "-1x5", "1.5x2", "701x623x3", "axb"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Size.parse(text)
    assert str(caught.value) == f"not a size ({text!r}): write WIDTHxHEIGHT in pixels, for example 8698x7496"


def test_size_prints_as_it_is_parsed() -> None:
    assert str(Size(701, 623)) == "701x623"
    assert Size(701, 623).area == 701 * 623


def test_box_edges() -> None:
    box = Box.from_edges(2, 3, 10, 7)
    assert (box.left, box.top, box.right, box.bottom) == (2, 3, 10, 7)
    assert box.size == Size(8, 4)
    assert Box.covering(Size(5, 4)) == Box(0, 0, 5, 4)
    assert box.rows_columns == (slice(3, 7), slice(2, 10))
    assert np.zeros((9, 12))[box.rows_columns].shape == (4, 8)


def test_negative_sides_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        Box.from_edges(5, 0, 4, 1)
    with pytest.raises(AssertionError):
        Size(-1, 2)


def cells(box: Box) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box.left, box.right) for y in range(box.top, box.bottom)}


@given(boxes, boxes)
def test_intersection_holds_the_common_cells(a: Box, b: Box) -> None:
    common = a.intersection(b)
    assert cells(common) == cells(a) & cells(b)
    assert common.empty == (not cells(common))


@given(boxes, boxes)
def test_containment_is_of_every_cell(a: Box, b: Box) -> None:
    if a.contains(b):
        assert cells(b) <= cells(a)
    elif not b.empty:
        assert not cells(b) <= cells(a)


@given(boxes, boxes)
def test_relative_box_is_the_same_cells_in_another_frame(a: Box, origin: Box) -> None:
    assert a.relative_to(origin).shifted(origin.left, origin.top) == a


def test_mean_scale() -> None:
    assert Mpp(0.5, 0.7).mean == pytest.approx(0.6)
