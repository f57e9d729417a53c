"""Which windows of slides the ranges of 8-bit activations are observed on."""

from __future__ import annotations

import numpy as np
import torch

from wholeslide.geometry import Box
from wholeslide.model.quantization import Calibration, stored_pixels
from wholeslide.streaming.background import PixelSource

#: Of each slide: enough to meet its tissues, its glass and its edges.
_WINDOWS, _WINDOW_PX = 8, 576


@torch.no_grad()
def observe_slide(calibration: Calibration, view: PixelSource) -> None:
    """Widen the ranges by windows that are spread evenly over a slide, those that hold nothing but background apart.

    Args:
        calibration: of a network.
        view: the slide, of a size that that network pads to.

    Raises:
        SlideError: the slide cannot be read.
    """
    for px_box in _windows(view):
        calibration.observe(stored_pixels(view.read(px_box)))


def _windows(view: PixelSource) -> list[Box]:
    width, height = min(_WINDOW_PX, view.size.width), min(_WINDOW_PX, view.size.height)
    boxes = [
        Box(left, top, width, height)
        for top in _starts(view.size.height, height)
        for left in _starts(view.size.width, width)
    ]
    seen = [box for box in boxes if not view.is_background(box)] or boxes
    return [seen[index] for index in np.unique(np.linspace(0, len(seen) - 1, _WINDOWS).round().astype(int))]


def _starts(length: int, window: int) -> list[int]:
    """Of windows that cover an axis; the last one ends with it."""
    return [*range(0, length - window, window), length - window]
