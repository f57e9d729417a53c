"""Synthetic slides for tests: H&E-like tissue on glass, and readers that live in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

DATA = Path(os.environ.get("WHOLESLIDE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))

GLASS = (242, 242, 244)
STROMA = (225, 150, 185)
NUCLEI = (110, 70, 150)


def real_file(name: str) -> Path:
    """A file of the test data, or a skip that says why."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"test data {name} is not there (WHOLESLIDE_TEST_DATA={DATA})")
    return path


def texture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Random colours: uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tissue_image(width: int = 640, height: int = 512, seed: int = 0) -> np.ndarray:
    """An ellipse of stroma with nuclei in the middle of glass: uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), GLASS)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.25, height * 0.25, width * 0.75, height * 0.75), fill=STROMA)
    for x, y in rng.uniform(0.36, 0.64, (max(20, width * height // 2000), 2)):
        draw.ellipse((x * width - 3, y * height - 3, x * width + 3, y * height + 3), fill=NUCLEI)
    noisy = np.asarray(image, np.int16) + rng.integers(-3, 4, (height, width, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def write_pyramid(path: Path, image: np.ndarray, mpp: float | None = 2.0, levels: int = 2, **options: Any) -> Path:
    """A tiled pyramidal TIFF as OpenSlide's generic reader opens it."""
    scale = {} if mpp is None else {"resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            step = 2**level
            if mpp is not None:
                scale["resolution"] = (1e4 / (mpp * step), 1e4 / (mpp * step))
            rows, columns = image.shape[0] // step * step, image.shape[1] // step * step
            pixels = image[:rows, :columns].reshape(rows // step, step, columns // step, step, 3).mean(axis=(1, 3))
            writer.write(
                pixels.astype(np.uint8),
                tile=(64, 64),
                photometric="rgb",
                metadata=None,
                subfiletype=int(level > 0),
                **scale,
                **options,
            )
    return path


def write_ome(path: Path, image: np.ndarray, *, mpp: float = 0.5, unit: str = "µm", **options: Any) -> Path:
    """An OME-TIFF whose second level lies in a SubIFD."""
    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": mpp,
        "PhysicalSizeY": mpp,
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeYUnit": unit,
    }
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(image, subifds=1, tile=(64, 64), photometric="rgb", metadata=metadata, **options)
        writer.write(image[::2, ::2], subfiletype=1, tile=(64, 64), photometric="rgb", **options)
    return path
