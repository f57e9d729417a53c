"""Memory in percent of end to end: measured, extrapolated, and what the paper has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wholeslide.bench.comparison import shares_of_end_to_end
from wholeslide.bench.paper import TABLE_2, share_of_end_to_end
from wholeslide.bench.picture import draw_shares
from wholeslide.geometry import Size

GIB = 2**30


def row(size: str, stages: int, mode: str = "streamed", gib: float | None = 1.0, **extra: Any) -> dict[str, Any]:
    parsed = Size.parse(size)
    facts = {
        "method": "end-to-end" if stages == 1 else "local",
        "stages": stages,
        "mode": mode,
        "store": "disk" if mode == "streamed" else "none",
        "dtype": "bf16",
        "width": parsed.width,
        "height": parsed.height,
        "tissue_fraction": 1.0,
        **extra,
    }
    if gib is None:
        return {**facts, "measured": False, "reason": "too large for this machine"}
    return {**facts, "baseline_bytes": GIB, "peak_bytes": int((1 + gib) * GIB)}


def test_a_share_of_what_end_to_end_took_at_that_size() -> None:
    streamed, whole = shares_of_end_to_end([row("8698x7496", 8, gib=0.5), row("8698x7496", 1, "whole", gib=10)])
    assert (streamed.of_end_to_end, streamed.extrapolated) == (0.05, False)
    assert streamed.label == "K = 8, streamed, features on disk, bf16"
    assert streamed.paper_gigabytes == 3.71
    assert streamed.paper_of_end_to_end == pytest.approx(0.2074, abs=1e-4)
    assert (whole.end_to_end, whole.of_end_to_end, whole.paper_of_end_to_end) == (True, 1.0, 1.0)


def test_end_to_end_that_did_not_run_is_extrapolated_from_the_largest_that_did() -> None:
    rows = [
        row("1000x1000", 1, "whole", gib=3),
        row("2000x1000", 1, "whole", gib=5),
        row("4000x2000", 1, "whole", gib=None),
        row("4000x2000", 4, gib=2),
    ]
    _, _, whole, streamed = shares_of_end_to_end(rows)
    assert (whole.over_baseline_bytes, whole.extrapolated, whole.of_end_to_end) == (20 * GIB, True, 1.0)
    assert (streamed.of_end_to_end, streamed.extrapolated) == (0.1, True)
    assert streamed.paper_gigabytes is None


def test_only_what_computes_alike_is_compared() -> None:
    rows = [row("1000x1000", 1, "whole", gib=4, dtype="fp32"), row("1000x1000", 4)]
    assert shares_of_end_to_end(rows)[1].of_end_to_end is None
    rows = [row("1000x1000", 1, "whole", gib=4), row("1000x1000", 1, "whole", gib=2, tissue_fraction=0.3)]
    found = shares_of_end_to_end([*rows, row("1000x1000", 4, tissue_fraction=0.3)])[2]
    assert found.of_end_to_end == 0.5
    assert found.label.endswith("30% tissue")


def test_what_was_not_measured_has_no_share() -> None:
    assert shares_of_end_to_end([row("1000x1000", 4, gib=None), row("1000x1000", 1, "whole", gib=None)]) == []


def test_the_papers_own_shares() -> None:
    """Section 3: 29.9% with four stages and 20.7% with eight, at the smallest size."""
    smallest = min(TABLE_2, key=lambda size: size.area)
    shares = {stages: share_of_end_to_end(smallest, stages) for stages in (1, 2, 4, 8)}
    assert shares[1] == 1.0
    assert shares[2] is None
    assert [round(100 * share, 1) for share in (shares[4], shares[8]) if share is not None] == [29.9, 20.7]
    assert share_of_end_to_end(Size(1, 1), 4) is None


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture_says_what_is_compared(ending: str, tmp_path: Path) -> None:
    rows = [row(size, 1, "whole", gib=gib) for size, gib in (("8698x7496", 10), ("12223x10057", None))]
    rows += [row(size, stages) for size in ("8698x7496", "12223x10057") for stages in (2, 8)]
    path = tmp_path / f"memory{ending}"
    draw_shares(shares_of_end_to_end(rows), path)
    assert path.stat().st_size > 10_000
