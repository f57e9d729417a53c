"""What a pipeline is asked."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.geometry import Size

MEANT = {"local": ("bf16", 3), "local-int8": ("int8", 3), "gabmil-usual": ("fp32", 2), "gabmil-tuned": ("bf16", 2)}
"""Arithmetic and first stride of each pipeline as it is meant to be run."""
PIPELINES = tuple(MEANT)


@dataclass(frozen=True, kw_only=True)
class SpeedCase:
    """One row: predicting the slide at ``path``, ``width`` by ``height`` pixels at 5x and ``tissue_fraction`` of it tissue."""

    path: str
    width: int
    height: int
    tissue_fraction: float
    pipeline: str
    dtype: str
    first_stride: int
    stages: int
    backbone: str
    repeats: int
    seed: int

    @property
    def size(self) -> Size:
        """Of the slide in pixels at 5x."""
        return Size(self.width, self.height)
