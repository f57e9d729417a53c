"""What a pipeline is asked."""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.geometry import Size

PIPELINES = ("local", "local-int8", "gabmil-usual", "gabmil-tuned")


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
