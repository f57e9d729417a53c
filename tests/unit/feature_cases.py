"""What the tests of patch features share."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
from slides_cases import write_pyramid
from torch import nn

from wholeslide.baselines.encoder import PatchEncoder
from wholeslide.streaming.execution import Execution


def pixel_encoder(patch_px: int) -> PatchEncoder:
    """Its features are the patch's own pixels in [0, 1], in the order (3, h, w)."""
    plain = Execution("fp32", channels_last=False)
    return PatchEncoder(nn.Flatten(), patch_px=patch_px, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1), execution=plain)


def smooth(width: int, height: int, *, cell_px: int, seed: int = 0) -> np.ndarray:
    """Colours that change over about ``cell_px`` pixels: uint8 (height, width, 3)."""
    shape = (height // cell_px + 2, width // cell_px + 2, 3)
    knots = np.random.default_rng(seed).uniform(40, 220, shape)
    rows, columns = np.arange(height) / cell_px, np.arange(width) / cell_px
    top, left = rows.astype(int), columns.astype(int)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    upper = knots[top][:, left] * (1 - across) + knots[top][:, left + 1] * across
    lower = knots[top + 1][:, left] * (1 - across) + knots[top + 1][:, left + 1] * across
    return np.asarray(upper * (1 - down) + lower * down).astype(np.uint8)


def pyramid_40x(path: Path, *, seed: int = 0, jpeg: bool = False) -> Path:
    """Four levels from 0.25 µm a pixel, 1501 by 1131 of them, all of it colourful; two that are decoded reduced, as JPEG."""
    path.write_bytes(_pyramid(seed, jpeg))
    return path


@functools.cache
def _pyramid(seed: int, jpeg: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image = smooth(1501, 1131, cell_px=48, seed=seed)
        path = Path(folder) / "slide.tif"
        if jpeg:
            return write_pyramid(path, image, mpp=0.25, levels=2, compression="jpeg").read_bytes()
        return write_pyramid(path, image, mpp=0.25, levels=4).read_bytes()
