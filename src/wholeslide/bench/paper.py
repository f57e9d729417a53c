"""The figures that the benchmarks are set beside.

Table 2 of Zhang et al., "Gigapixel Whole-Slide Images Classification using Locally Supervised Learning", MICCAI 2022: GPU memory
of training with one slide, ResNet34, in the paper's unit "G". The largest end-to-end figure was measured on a CPU.

Table 3: seconds of one prediction on a GPU, by GABMIL (cutting tiles, their features with ResNet34, and both with the classifier)
and by the paper's network.
"""

from __future__ import annotations

from dataclasses import dataclass

from wholeslide.geometry import Size

SOURCE = "Zhang et al., MICCAI 2022, Table 2"
SPEED_SOURCE = "Zhang et al., MICCAI 2022, Table 3"

#: Number of stages K; one is end to end.
Memory = dict[int, float]

TABLE_2: dict[Size, Memory] = {
    Size(8698, 7496): {1: 17.89, 4: 5.35, 8: 3.71},
    Size(12223, 10057): {1: 33.63, 4: 9.64, 8: 6.47},
    Size(23849, 10257): {1: 78.14, 4: 18.32, 8: 11.85},
}


@dataclass(frozen=True)
class PredictionSeconds:
    """One slide of the paper's Table 3: ``tiling``, ``features`` and ``total`` are GABMIL's, ``local`` is the paper's network."""

    tiling: float
    features: float
    total: float
    local: float


TABLE_3: dict[Size, PredictionSeconds] = {
    Size(8698, 7496): PredictionSeconds(0.3, 2.6, 2.9, 0.3),
    Size(12223, 10057): PredictionSeconds(0.7, 3.7, 4.4, 0.6),
    Size(23849, 10257): PredictionSeconds(1.8, 9.6, 11.4, 1.2),
}


def share_of_end_to_end(size: Size, stages: int) -> float | None:
    """What the paper's network of so many stages took, over what its end-to-end training took; nothing where it has no such row."""
    row = TABLE_2.get(size, {})
    return row[stages] / row[1] if stages in row else None
