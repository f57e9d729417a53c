"""How many times as long as the local network others take, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wholeslide.bench.paper import SPEED_SOURCE, TABLE_3
from wholeslide.bench.pipelines.case import MEANT
from wholeslide.geometry import Size

Row = dict[str, Any]

OURS_IS = (
    "Ours: a CPU (its facts are in the file), seconds from opening the file to the probabilities, files in memory."
)
THEIRS_IS = (
    f"Paper: a GPU ({SPEED_SOURCE}), GABMIL in fp32 with ResNet34's own stride 2 against the local network at stride 3."
)
EQUAL_IS = (
    "= marks the same arithmetic and the same first stride: what remains between the two is the method and the reading."
)
AS_MEANT, EQUAL = "as each is meant to be run", "equal arithmetic and stride"
_SECONDS = ("total", "read", "compute")


@dataclass(frozen=True)
class Ratio:
    """One of GABMIL's rows over one of the local network's, of one slide.

    Attributes:
        size: of the slide in pixels at 5x.
        tissue_fraction: of the slide.
        gabmil: how the patches were run.
        local: how the local network was run.
        kind: :data:`EQUAL`, or :data:`AS_MEANT`: patches at stride 2, in fp32 or tuned, against the paper's stride 3.
        total: of the seconds from file to prediction.
        read: of those of reading alone.
        compute: of those of computing alone.
        flops: of the undivided networks' arithmetic.
        paper_total: the paper's total over its local network's, where it has this size.
    """

    size: Size
    tissue_fraction: float
    gabmil: str
    local: str
    kind: str
    total: float
    read: float
    compute: float
    flops: float
    paper_total: float | None


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Of every row of GABMIL that was measured, over each row of the local network that it is to be compared with."""
    measured = [row for row in rows if row.get("measured", True)]
    locals_ = [row for row in measured if row["pipeline"].startswith("local")]
    found = []
    for row in measured:
        if row["pipeline"].startswith("local"):
            continue
        for local in locals_:
            kind = _kind(row, local)
            if kind is not None and _slide(row) == _slide(local):
                found.append(_ratio(row, local, kind))
    return found


def paper_ratio(size: Size) -> float | None:
    """GABMIL's total over the local network's, in the paper; nothing where it has no such slide."""
    theirs = TABLE_3.get(size)
    return theirs.total / theirs.local if theirs is not None else None


def label(row: Row) -> str:
    """How a row was run."""
    return f"{row['pipeline']} {row['dtype']} /{row['first_stride']}"


def _kind(row: Row, local: Row) -> str | None:
    if (row["dtype"], row["first_stride"]) == (local["dtype"], local["first_stride"]):
        return EQUAL
    meant = all(MEANT[one["pipeline"]] == (one["dtype"], one["first_stride"]) for one in (row, local))
    return AS_MEANT if meant else None


def _ratio(row: Row, local: Row, kind: str) -> Ratio:
    size = Size(row["width"], row["height"])
    total, read, compute = (row[f"{part}_seconds"] / local[f"{part}_seconds"] for part in _SECONDS)
    return Ratio(
        size=size,
        tissue_fraction=row["tissue_fraction"],
        gabmil=label(row),
        local=label(local),
        kind=kind,
        total=total,
        read=read,
        compute=compute,
        flops=row["flops"] / local["flops"],
        paper_total=paper_ratio(size),
    )


def _slide(row: Row) -> tuple[int, int, float]:
    return row["width"], row["height"], row["tissue_fraction"]
