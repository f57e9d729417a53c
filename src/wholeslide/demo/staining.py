"""From objects to an image that looks like a haematoxylin and eosin slide at 2 microns per pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wholeslide.demo.arrangement import EDGE_PX, Arrangement, Layout, Points, draw_layout
from wholeslide.geometry import Size

RgbImage = NDArray[np.uint8]
_Field = NDArray[np.float32]

_HAEMATOXYLIN_OD = np.array([0.65, 0.70, 0.29])
_EOSIN_OD = np.array([0.09, 0.88, 0.46])
"""Optical density in red, green and blue of one unit of each dye."""


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """Everything that the two slides of a pair share.

    ``size`` is the whole image in working pixels, glass included; ``px_origin`` the upper left corner of the tissue's
    bounding box in it; ``glass_rgb`` ``(3,)``; ``haematoxylin_od``, ``eosin_od`` ``(3,)``: this pair's dyes;
    ``texture_seed`` seeds the tissue's texture.
    """

    size: Size
    px_origin: Points
    px_outline: Points
    layout: Layout
    glass_rgb: Points
    haematoxylin_od: Points
    eosin_od: Points
    texture_seed: int

    def render(self) -> dict[Arrangement, RgbImage]:
        """The slide once in each arrangement: ``(height, width, 3)``, 8 bits. All but the objects' places is equal."""
        rng = np.random.default_rng(self.texture_seed)
        canvas = Image.new("F", (self.size.width, self.size.height))
        ImageDraw.Draw(canvas).polygon([(x, y) for x, y in self.px_outline + self.px_origin], fill=1)
        tissue: _Field = np.asarray(canvas)
        eosin = (0.42 + 0.10 * cloud(self.size, 90, rng) + 0.05 * cloud(self.size, 7, rng)) * tissue
        stroma = (0.10 + 0.03 * cloud(self.size, 40, rng) + 0.02 * cloud(self.size, 3, rng)) * tissue
        grain = rng.standard_normal(tissue.shape, dtype=np.float32) * np.float32(0.012)
        images: dict[Arrangement, RgbImage] = {}
        for arrangement, px_centres in self.layout.px_centres.items():
            haematoxylin = stroma.copy()
            self._stain_objects(haematoxylin, px_centres + self.px_origin)
            images[arrangement] = self._transmitted(haematoxylin, eosin, grain)
        return images

    def _transmitted(self, haematoxylin: _Field, eosin: _Field, grain: _Field) -> RgbImage:
        """The colours behind the dyes by Beer and Lambert's law, ``(height, width, 3)``."""
        image = np.empty((*haematoxylin.shape, 3), dtype=np.uint8)
        for channel in range(3):
            density = haematoxylin * np.float32(self.haematoxylin_od[channel])
            density += eosin * np.float32(self.eosin_od[channel])
            density += grain
            np.negative(density, out=density)
            np.exp(density, out=density)
            density *= np.float32(self.glass_rgb[channel])
            image[..., channel] = np.clip(density, 0, 255, out=density)
        return image

    def _stain_objects(self, haematoxylin: _Field, px_centres: Points) -> None:
        """Adds every object's dye to the field, in place."""
        layout = self.layout
        for (x, y), (long, short), angle, amount in zip(
            px_centres, layout.semi_axes_px, layout.angles, layout.densities, strict=True
        ):
            reach = long + EDGE_PX
            columns = np.arange(math.ceil(x - reach), math.floor(x + reach) + 1)
            rows = np.arange(math.ceil(y - reach), math.floor(y + reach) + 1)
            dx, dy = columns[None, :] - x, rows[:, None] - y
            along = (dx * math.cos(angle) + dy * math.sin(angle)) / long
            across = (dy * math.cos(angle) - dx * math.sin(angle)) / short
            inside = np.clip((1 - np.hypot(along, across)) * short / EDGE_PX + 0.5, 0, 1)
            haematoxylin[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += (amount * inside).astype(np.float32)


def draw_specimen(rng: np.random.Generator, *, tissue_px: tuple[int, int]) -> Specimen:
    """One pair's tissue, glass, dyes and objects; the tissue's sides are drawn from ``tissue_px`` (inclusive)."""
    tissue = Size(int(rng.integers(tissue_px[0], tissue_px[1] + 1)), int(rng.integers(tissue_px[0], tissue_px[1] + 1)))
    margins_px = rng.integers(24, 97, size=4)
    px_outline = _outline(tissue, rng)
    return Specimen(
        size=Size(tissue.width + int(margins_px[:2].sum()), tissue.height + int(margins_px[2:].sum())),
        px_origin=margins_px[[0, 2]].astype(np.float64),
        px_outline=px_outline,
        layout=draw_layout(px_outline, rng),
        glass_rgb=rng.uniform(236, 250) + rng.uniform(-3, 3, 3),
        haematoxylin_od=_HAEMATOXYLIN_OD * rng.uniform(0.9, 1.1, 3) * rng.uniform(0.85, 1.15),
        eosin_od=_EOSIN_OD * rng.uniform(0.9, 1.1, 3) * rng.uniform(0.8, 1.2),
        texture_seed=int(rng.integers(2**32)),
    )


def _outline(tissue: Size, rng: np.random.Generator) -> Points:
    """``(m, 2)`` closed polygon, boxy and wavy, whose bounding box is exactly the tissue's size."""
    angle = np.linspace(0, 2 * math.pi, 721)
    boxy = (np.abs(np.cos(angle)) ** 5 + np.abs(np.sin(angle)) ** 5) ** (-1 / 5)
    waves = sum(
        rng.uniform(0, 0.12 / harmonic) * np.cos(harmonic * angle + rng.uniform(0, 2 * math.pi))
        for harmonic in range(2, 8)
    )
    points = (boxy * (1 + waves))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / (high - low) * (tissue.width, tissue.height))


def cloud(size: Size, grain_px: int, rng: np.random.Generator) -> _Field:
    """Smooth noise ``(height, width)`` of about zero mean, whose lumps are about ``grain_px`` wide."""
    coarse_size = Size(size.width // grain_px + 3, size.height // grain_px + 3)
    coarse = Image.fromarray(rng.standard_normal((coarse_size.height, coarse_size.width), dtype=np.float32))
    fine_px = (coarse_size.width * grain_px, coarse_size.height * grain_px)
    return np.asarray(coarse.resize(fine_px, Image.Resampling.BILINEAR))[: size.height, : size.width]
