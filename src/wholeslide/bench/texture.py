"""A slide of random texture on disk, of any size, written and read in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile

from wholeslide.geometry import Size

_TILE_PX = 512
_PATTERNS = 16


def write_texture(path: Path, size: Size, *, seed: int) -> None:
    """A tiled JPEG TIFF of random blobs; no pixel of it is background."""
    rng = np.random.default_rng(seed)
    patterns = [_pattern(rng) for _ in range(_PATTERNS)]
    columns, rows = -(-size.width // _TILE_PX), -(-size.height // _TILE_PX)

    def tiles() -> Iterator[np.ndarray]:
        for _ in range(rows * columns):
            yield patterns[rng.integers(_PATTERNS)]

    tifffile.imwrite(
        path,
        tiles(),
        shape=(size.height, size.width, 3),
        dtype=np.uint8,
        tile=(_TILE_PX, _TILE_PX),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 85},
        bigtiff=size.area > 2**30,
        metadata=None,
    )


def _pattern(rng: np.random.Generator) -> np.ndarray:
    """Noise at three scales, (h, w, 3) uint8."""
    layers = []
    for scale in (1, 4, 16):
        coarse = rng.normal(size=(_TILE_PX // scale, _TILE_PX // scale, 3))
        layers.append(coarse.repeat(scale, axis=0).repeat(scale, axis=1))
    return np.clip(150 + 25 * sum(layers), 0, 255).astype(np.uint8)
