"""A cohort whose classes differ in nothing but how far apart like objects lie, farther than any patch can see.

Four discs lie on sites of a turned 4 x 4 lattice: two pairs of neighbours (``paired``), or none next to another (``apart``). Both
take two corners and two sites of an edge, so that single objects are distributed alike, about the centre and to the border; and
neighbours are so far apart that no square patch touches two. What a set of patches can tell is the same for both classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from wholeslide.demo.staining import RgbImage, cloud
from wholeslide.geometry import Size

SITES: dict[str, tuple[tuple[int, int], ...]] = {
    "apart": ((0, 0), (0, 2), (3, 1), (3, 3)),
    "paired": ((0, 0), (0, 1), (3, 2), (3, 3)),
}
"""Rows and columns of the lattice, by class."""
PATCH_PX = 256
RADIUS_PX = 32.0
JITTER_PX = 3.0
LEAST_DISTANCE_PX = math.sqrt(2) * PATCH_PX + 2 * (RADIUS_PX + math.sqrt(2) * JITTER_PX)
"""Neighbours that lie at least so far apart are never touched by one patch, whatever the lattice's turn."""
_SHIFT_PX = 40.0
_STROMA_RGB, _DISC_RGB = np.array([222.0, 180.0, 205.0]), np.array([70.0, 50.0, 130.0])
_JPEG_QUALITY = 92

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DistanceCohortConfig:
    """What is generated.

    ``train_pairs``, ``valid_pairs``, ``test_pairs``: pairs of slides, one of each class, in each split; ``distance_px``: of
    neighbours; ``side_px``: of the square slides; ``seed``: every draw.
    """

    train_pairs: int = 60
    valid_pairs: int = 10
    test_pairs: int = 40
    distance_px: float = 440.0
    side_px: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.distance_px >= LEAST_DISTANCE_PX, "a patch may touch two objects"
        reach = 1.5 * math.sqrt(2) * self.distance_px + _SHIFT_PX + RADIUS_PX + 2 * JITTER_PX
        assert self.side_px >= 2 * reach, "objects may lie outside"

    @property
    def splits(self) -> list[str]:
        """The split of each pair, in the pairs' order."""
        return ["train"] * self.train_pairs + ["valid"] * self.valid_pairs + ["test"] * self.test_pairs


def draw_centres(config: DistanceCohortConfig, rng: np.random.Generator) -> dict[str, Points]:
    """The four centres (x, y) in pixels, ``(4, 2)``, of a pair of slides, by class: one turn, shift and jitter for both."""
    centre = config.side_px / 2 + rng.uniform(-_SHIFT_PX, _SHIFT_PX, 2)
    angle, mirrored = rng.uniform(0, 2 * math.pi), bool(rng.integers(2))
    jitter = rng.uniform(-JITTER_PX, JITTER_PX, (4, 2))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    found = {}
    for name, sites in SITES.items():
        offsets = np.array(sites, dtype=np.float64) - 1.5
        if mirrored:
            offsets[:, 0] *= -1
        found[name] = centre + config.distance_px * offsets @ rotation + jitter
    return found


def draw_images(config: DistanceCohortConfig, number: int) -> dict[str, RgbImage]:
    """The pair ``number`` of slides, ``(side, side, 3)``, by class: the same tissue, and the same discs elsewhere."""
    rng = np.random.default_rng([config.seed, number])
    centres, size = draw_centres(config, rng), Size(config.side_px, config.side_px)
    tissue = (10 * cloud(size, 60, rng) + 6 * cloud(size, 5, rng))[..., None] * np.array([1.0, 1.2, 0.8]) + _STROMA_RGB
    tissue += rng.normal(0, 3, tissue.shape)
    radii = rng.uniform(0.8, 1, 4) * RADIUS_PX
    images = {}
    for name, points in centres.items():
        image = tissue.copy()
        for (x, y), radius in zip(points, rng.permutation(radii), strict=True):
            _draw_disc(image, x, y, radius)
        images[name] = np.clip(image, 0, 255).astype(np.uint8)
    return images


def write_distance_cohort(folder: Path, config: DistanceCohortConfig) -> Path:
    """Write JPEG files and ``labels.csv`` (file, patient, label, split) into ``folder``.

    The two slides of a pair are two patients of one split.

    Returns:
        the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, split in enumerate(config.splits):
        images = draw_images(config, number)
        swapped = bool(
            np.random.default_rng([config.seed, number, 1]).integers(2)
        )  # the letter says nothing of the class
        for letter, name in zip("ab", sorted(images, reverse=swapped), strict=True):
            stem = f"slide-{number:03d}{letter}"
            Image.fromarray(images[name]).save(folder / f"{stem}.jpg", quality=_JPEG_QUALITY)
            rows.append({"file": f"{stem}.jpg", "patient": stem, "label": name, "split": split})
    manifest = folder / "labels.csv"
    pd.DataFrame(rows).to_csv(manifest, index=False)
    return manifest


def _draw_disc(image: NDArray[np.float64], x: float, y: float, radius: float) -> None:
    """A disc with a soft edge, in place."""
    left, top, side = math.floor(x - radius) - 1, math.floor(y - radius) - 1, math.ceil(2 * radius) + 3
    rows, columns = np.mgrid[top : top + side, left : left + side]
    inside = np.clip(radius - np.hypot(columns - x, rows - y) + 0.5, 0, 1)[..., None]
    image[rows, columns] = image[rows, columns] * (1 - inside) + _DISC_RGB * inside
