"""A synthetic cohort of pyramidal TIFF slides whose classes differ only in how the same objects are arranged."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tifffile
from PIL import Image

from wholeslide.demo.arrangement import ARRANGEMENTS
from wholeslide.demo.staining import RgbImage, Specimen, draw_specimen

MPP = 2.0
"""Microns per pixel of the stored slides, which is the default working resolution."""
_TILE_PX = 256
_SMALLEST_LEVEL_PX = 256
_JPEG_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class DemoCohortConfig:
    """What is generated.

    ``train_pairs``, ``valid_pairs``, ``test_pairs``: pairs of slides in each split; ``tissue_px``: smallest and largest
    side of the tissue's bounding box, in working pixels; ``seed``: every draw; ``workers``: threads that write slides.
    """

    train_pairs: int = 30
    valid_pairs: int = 6
    test_pairs: int = 22
    tissue_px: tuple[int, int] = (1060, 1400)
    seed: int = 0
    workers: int = 2

    @property
    def splits(self) -> list[str]:
        """The split of each pair, in the pairs' order."""
        return ["train"] * self.train_pairs + ["valid"] * self.valid_pairs + ["test"] * self.test_pairs


def draw_pairs(count: int, *, seed: int, tissue_px: tuple[int, int]) -> Iterator[Specimen]:
    """The first ``count`` pairs of a seed; a pair depends on the seed, its number and the size, not on the count."""
    for pair in range(count):
        yield draw_specimen(np.random.default_rng([seed, pair]), tissue_px=tissue_px)


def write_cohort(folder: Path, config: DemoCohortConfig) -> Path:
    """Writes ``slides/*.tif`` and ``manifest.csv`` into ``folder``; existing ones are replaced.

    The manifest has the columns file, slide, patient, label, pair and split. The slides of a pair lie in the same
    split and are two patients, so that predictions of the two classes are never averaged.

    Returns:
        the manifest.
    """
    slides = folder / "slides"
    slides.mkdir(parents=True, exist_ok=True)
    specimens = draw_pairs(len(config.splits), seed=config.seed, tissue_px=config.tissue_px)
    with ThreadPoolExecutor(config.workers) as pool:
        pairs = [
            pool.submit(_write_pair, slides, number, split, specimen)
            for number, (split, specimen) in enumerate(zip(config.splits, specimens, strict=True))
        ]
        rows = [row for pair in pairs for row in pair.result()]
    manifest = folder / "manifest.csv"
    pd.DataFrame(rows).to_csv(manifest, index=False)
    return manifest


def _write_pair(slides: Path, number: int, split: str, specimen: Specimen) -> list[dict[str, str]]:
    """Writes the two slides of a pair and returns their rows of the manifest.

    Their names are told apart by a letter that says nothing about the class.
    """
    order = ARRANGEMENTS if np.random.default_rng(specimen.texture_seed).random() < 0.5 else ARRANGEMENTS[::-1]
    images = specimen.render()
    rows = []
    for letter, arrangement in zip("ab", order, strict=True):
        stem = f"slide-{number:03d}{letter}"
        write_pyramid(slides / f"{stem}.tif", images[arrangement], mpp=MPP)
        rows.append(
            {
                "file": f"{stem}.tif",
                "slide": stem,
                "patient": f"patient-{number:03d}{letter}",
                "label": arrangement,
                "pair": f"pair-{number:03d}",
                "split": split,
            }
        )
    return rows


def write_pyramid(path: Path, image: RgbImage, *, mpp: float) -> None:
    """Writes ``(height, width, 3)`` as a tiled JPEG pyramid with resolution tags, which OpenSlide and QuPath open."""
    with tifffile.TiffWriter(path) as tiff:
        scale = 1
        while True:
            tiff.write(
                image,
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                tile=(_TILE_PX, _TILE_PX),
                resolution=(1e4 / (mpp * scale), 1e4 / (mpp * scale)),
                resolutionunit="CENTIMETER",
                subfiletype=0 if scale == 1 else 1,
                metadata=None,
            )
            if min(image.shape[:2]) < 2 * _SMALLEST_LEVEL_PX:
                return
            image = np.asarray(Image.fromarray(image).reduce(2))
            scale *= 2
