"""Tables that a person reads before training."""

from __future__ import annotations

from dataclasses import replace

from test_streaming_recovery import plan

from wholeslide.geometry import Size
from wholeslide.train.fitting import Candidate, candidate_lines
from wholeslide.train.tables import plan_lines


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


def test_a_plan_has_a_row_for_each_stage() -> None:
    lines = plan_lines(plan())
    assert lines[0] == "plan for views of up to 3000x2000 px: bf16, channels last, features between stages on disk"
    assert cells(lines[1]) == ["part", "tile side", "tiles", "graphs kept", "features", "peak of a step"]
    rows = [cells(line) for line in lines[3:]]
    assert [row[0] for row in rows] == ["stem", "stage 1", "stage 2"]
    assert rows[0][3] == "-"
    assert rows[2][1:4] == ["1000 px", "6", "6%"]
    assert len({line.index("px") for line in lines[3:]}) == 1
    assert rows[1][4] == "4 KiB"
    assert "\n".join(lines).isascii()


def test_a_plan_of_an_earlier_version_is_shown_as_far_as_it_goes() -> None:
    lines = plan_lines(replace(plan(), needs=()))
    assert lines[1] == "  tiles of at most 1536, 8192, 1000 px a side (stem, stages 1 to 2)"


def test_candidates_say_time_memory_and_whether_they_fit() -> None:
    found = (Candidate(1, 3 * 2**30, None, fits=False), Candidate(4, 2**30, 1.5, fits=True))
    lines = candidate_lines(found, 4, Size(2000, 1000))
    assert cells(lines[3]) == ["1", "-", "-", "3.00 GiB", "no", ""]
    assert cells(lines[4]) == ["4", "1.5 s", "3 s", "1.00 GiB", "yes", "chosen"]
