"""Memory in percent of end-to-end training, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wholeslide.bench.paper import SOURCE, TABLE_2, share_of_end_to_end
from wholeslide.geometry import Size

Row = dict[str, Any]

OURS_IS = (
    "Ours: resident memory of a process on a CPU, above what it held before the step; features between stages in host memory "
    "or on disk, as the row says."
)
THEIRS_IS = f"Paper: GPU memory ({SOURCE}; its largest end-to-end figure was measured on a CPU)."
_PLACES = {"host": "in host memory", "device": "in host memory", "disk": "on disk"}
EXTRAPOLATED_IS = (
    "* End to end did not run at this size here: extrapolated, linearly in pixels, from the largest that did."
)


@dataclass(frozen=True)
class Share:
    """One network at one size.

    Attributes:
        size: of the slide in pixels.
        stages: number K of stages; one is end to end.
        label: how it was run.
        end_to_end: whether it is what the others are compared with: one stage, in one piece.
        over_baseline_bytes: what was measured; of the row for end to end in one piece, it may be extrapolated.
        of_end_to_end: over what end to end in one piece takes at this size; nothing where no such row ran at any size.
        extrapolated: whether end to end in one piece is extrapolated at this size.
        paper_gigabytes: what the paper has for this size and K, if it has.
        paper_of_end_to_end: over the paper's end to end at this size.
    """

    size: Size
    stages: int
    label: str
    end_to_end: bool
    over_baseline_bytes: int
    of_end_to_end: float | None
    extrapolated: bool
    paper_gigabytes: float | None
    paper_of_end_to_end: float | None


def shares_of_end_to_end(rows: Sequence[Row]) -> list[Share]:
    """What each row that was measured takes; and end to end in one piece where it was asked for and did not run."""
    whole = [row for row in rows if _is_end_to_end(row)]
    shares = []
    for row in rows:
        reference = _end_to_end(row, whole)
        if row.get("measured", True):
            used_bytes: float = over_baseline_bytes(row)
        elif _is_end_to_end(row) and reference is not None:
            used_bytes = reference[0]
        else:
            continue
        size = _size(row)
        shares.append(
            Share(
                size=size,
                stages=row["stages"],
                label=_label(row),
                end_to_end=_is_end_to_end(row),
                over_baseline_bytes=int(used_bytes),
                of_end_to_end=used_bytes / reference[0] if reference is not None else None,
                extrapolated=reference is not None and reference[1],
                paper_gigabytes=TABLE_2.get(size, {}).get(row["stages"]),
                paper_of_end_to_end=share_of_end_to_end(size, row["stages"]),
            )
        )
    return shares


def over_baseline_bytes(row: Row) -> int:
    """What a step took above what the process held before it."""
    return int(row["peak_bytes"] - row["baseline_bytes"])


def _is_end_to_end(row: Row) -> bool:
    return bool(row["method"] == "end-to-end" and row["mode"] == "whole")


def _end_to_end(row: Row, whole: Sequence[Row]) -> tuple[float, bool] | None:
    """Bytes of end to end in one piece at a row's size and dtype, and whether they are extrapolated."""
    alike = [other for other in whole if other.get("measured", True) and other["dtype"] == row["dtype"]]
    if not alike:
        return None
    own = [other for other in alike if _size(other) == _size(row)]
    same_slide = [other for other in own if other["tissue_fraction"] == row["tissue_fraction"]]
    for found in (same_slide, own):
        if found:
            return over_baseline_bytes(found[0]), False
    largest = max(alike, key=lambda other: _size(other).area)
    return over_baseline_bytes(largest) * _size(row).area / _size(largest).area, True


def _size(row: Row) -> Size:
    return Size(row["width"], row["height"])


def _label(row: Row) -> str:
    """How a row was run."""
    parts = ["end to end" if row["method"] == "end-to-end" else f"K = {row['stages']}", row["mode"]]
    parts += [f"features {_PLACES[row['store']]}"] if row["mode"] == "streamed" else []
    parts += [row["dtype"]]
    parts += [f"{row['tissue_fraction']:.0%} tissue"] if row["tissue_fraction"] < 1 else []
    return ", ".join(parts)
