"""Where the objects of a synthetic slide lie: the same ellipses once on rings and once in discs.

Nothing but the arrangement may tell the classes apart, so the objects of a pair of slides are drawn once and put down
twice, and no two of them ever lie close enough for a small patch to touch both (:data:`OBJECT_DISTANCE_PX`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Arrangement = Literal["disc", "ring"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("disc", "ring")

PATCH_PX = 16
"""Side of the square patches that must not see the arrangement."""
LARGEST_SEMI_AXIS_PX = 8.0
EDGE_PX = 1.0
"""Width of an object's soft edge outside its outline."""
OBJECT_DISTANCE_PX = 2 * (LARGEST_SEMI_AXIS_PX + EDGE_PX) + math.sqrt(2) * PATCH_PX
"""Centres lie at least this far apart. Two points of a patch are at most its diagonal apart, and an object reaches at
most its semi-axis and edge from its centre: so no patch touches two objects, in either arrangement, and what a patch
can see (one object or none, anywhere in it) has the same distribution in both classes."""
_JITTER_PX = 1.0
_DISC_SPACING_PX = OBJECT_DISTANCE_PX + 2 * _JITTER_PX
_RING_SPACING_PX = 1.25 * _DISC_SPACING_PX
_OBJECTS_IN_GROUP = (18, 22)
_TRIES = 200
_GROUP_REACH_PX = 3.6 * _RING_SPACING_PX
"""No centre of a group lies farther from the group's own centre."""
_PX_AREA_PER_GROUP = (220_000, 350_000)
_PX_AREA_PER_BYSTANDER = (25_000, 50_000)
"""Objects outside any group, which lie at the same place in both arrangements."""

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The n objects of a pair of slides, and the two places of each.

    ``px_centres`` maps an arrangement to the ``(n, 2)`` centres (x, y) in pixels of the tissue's bounding box;
    ``semi_axes_px`` is ``(n, 2)``, long one first; ``angles`` ``(n,)`` in radians; ``densities`` ``(n,)`` is the amount
    of haematoxylin.
    """

    px_centres: Mapping[Arrangement, Points]
    semi_axes_px: Points
    angles: Points
    densities: Points


def draw_layout(px_outline: Points, rng: np.random.Generator) -> Layout:
    """Objects for a tissue whose outline is the ``(m, 2)`` polygon ``px_outline``."""
    rings, discs = [], []
    taken = _Taken(px_outline)
    px_area = float(np.prod(np.ptp(px_outline, axis=0)))
    for _ in range(max(1, round(px_area / rng.uniform(*_PX_AREA_PER_GROUP)))):
        centre = taken.place(_GROUP_REACH_PX, rng)
        if centre is not None:
            count = int(rng.integers(_OBJECTS_IN_GROUP[0], _OBJECTS_IN_GROUP[1] + 1))
            rings.append(centre + _ring(count, rng))
            discs.append(centre + rng.permutation(_disc(count, rng)))
    assert rings, "the tissue is too small for a group"
    for _ in range(round(px_area / rng.uniform(*_PX_AREA_PER_BYSTANDER))):
        centre = taken.place(0.0, rng)
        if centre is not None:
            rings.append(centre[None])
            discs.append(centre[None])
    px_centres: dict[Arrangement, Points] = {"disc": np.concatenate(discs), "ring": np.concatenate(rings)}
    count = len(px_centres["ring"])
    long_axis = rng.uniform(0.75, 1.0, count) * LARGEST_SEMI_AXIS_PX
    return Layout(
        px_centres=px_centres,
        semi_axes_px=np.stack([long_axis, long_axis * rng.uniform(0.6, 0.9, count)], axis=1),
        angles=rng.uniform(0, math.pi, count),
        densities=rng.uniform(0.8, 1.2, count),
    )


def _ring(count: int, rng: np.random.Generator) -> Points:
    """``(count, 2)`` points on a circle about the origin, each ``_RING_SPACING_PX`` from the next before the jitter."""
    angles = rng.uniform(0, 2 * math.pi) + np.arange(count) * (2 * math.pi / count)
    radius = _RING_SPACING_PX / (2 * math.sin(math.pi / count))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) + _jitter(count, rng)


def _disc(count: int, rng: np.random.Generator) -> Points:
    """The ``count`` points of a hexagonal grid of ``_DISC_SPACING_PX`` that lie nearest to its centre, centred."""
    columns, rows = np.meshgrid(np.arange(-6, 7), np.arange(-6, 7))
    grid = np.stack([columns + rows / 2, rows * math.sqrt(3) / 2], axis=-1).reshape(-1, 2) * _DISC_SPACING_PX
    grid = grid + rng.uniform(-0.25, 0.25, 2) * _DISC_SPACING_PX
    nearest = grid[np.argsort(np.linalg.norm(grid, axis=1), kind="stable")[:count]]
    turn = rng.uniform(0, 2 * math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    centred: Points = (nearest - nearest.mean(axis=0)) @ rotation
    return centred + _jitter(count, rng)


def _jitter(count: int, rng: np.random.Generator) -> Points:
    """``(count, 2)`` shifts of at most ``_JITTER_PX``."""
    length, angle = rng.uniform(0, _JITTER_PX, count), rng.uniform(0, 2 * math.pi, count)
    return np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1)


class _Taken:
    """The circles that are already occupied inside a tissue."""

    def __init__(self, px_outline: Points) -> None:
        self._px_outline = px_outline
        self._px_centres: list[Points] = []
        self._reaches_px: list[float] = []

    def place(self, reach_px: float, rng: np.random.Generator) -> Points | None:
        """A free centre for objects within ``reach_px`` of it, or None where no try of many finds one."""
        for _ in range(_TRIES):
            px_centre: Points = rng.uniform(self._px_outline.min(axis=0), self._px_outline.max(axis=0))
            if self._free(px_centre, reach_px):
                self._px_centres.append(px_centre)
                self._reaches_px.append(reach_px)
                return px_centre
        return None

    def _free(self, px_centre: Points, reach_px: float) -> bool:
        for px_other, other_reach_px in zip(self._px_centres, self._reaches_px, strict=True):
            if math.dist(px_centre, px_other) < reach_px + other_reach_px + OBJECT_DISTANCE_PX:
                return False
        return self._inside(px_centre, reach_px + OBJECT_DISTANCE_PX / 2)

    def _inside(self, px_centre: Points, margin_px: float) -> bool:
        """Whether the outline runs once around the centre and nowhere within ``margin_px`` of it."""
        px_offsets = self._px_outline - px_centre
        if np.linalg.norm(px_offsets, axis=1).min() < margin_px:
            return False
        turns = np.unwrap(np.arctan2(px_offsets[:, 1], px_offsets[:, 0]), discont=math.pi)
        return bool(abs(turns[-1] - turns[0]) > math.pi)
