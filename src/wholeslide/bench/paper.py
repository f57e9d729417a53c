"""The figures that ``bench memory`` is set beside.

Table 2 of Zhang et al., "Gigapixel Whole-Slide Images Classification using Locally Supervised Learning", MICCAI 2022: GPU memory
of training with one slide, ResNet34, in the paper's unit "G". The largest end-to-end figure was measured on a CPU.
"""

from __future__ import annotations

from wholeslide.geometry import Size

SOURCE = "Zhang et al., MICCAI 2022, Table 2"

#: Number of stages K; one is end to end.
Memory = dict[int, float]

TABLE_2: dict[Size, Memory] = {
    Size(8698, 7496): {1: 17.89, 4: 5.35, 8: 3.71},
    Size(12223, 10057): {1: 33.63, 4: 9.64, 8: 6.47},
    Size(23849, 10257): {1: 78.14, 4: 18.32, 8: 11.85},
}


def share_of_end_to_end(size: Size, stages: int) -> float | None:
    """What the paper's network of so many stages took, over what its end-to-end training took; nothing where it has no such row."""
    row = TABLE_2.get(size, {})
    return row[stages] / row[1] if stages in row else None
