"""The picture of a comparison: what is drawn is what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from wholeslide.compare import picture
from wholeslide.compare.paired import Difference
from wholeslide.compare.summary import Cost, Figure, FoldScores, Row, Summary

NOTHING = Cost(**dict.fromkeys(Cost.__dataclass_fields__))  # what a training costs is not drawn


def row(method: str, area: Figure, folds: list[float], difference: Difference | None, p: float | None) -> Row:
    scores = tuple(FoldScores(str(at), 0, {"auroc": value}) for at, value in enumerate(folds))
    return Row(method, method == "one", NOTHING, (), {"auroc": area}, scores, difference, p)


SUMMARY = Summary(
    rows=(
        row("one", Figure(0.7, 0.6, 0.8), [0.65, 0.75], None, None),
        Row("broken", False, NOTHING, ("it broke",), {}),
        row("other", Figure(0.9, 0.85, 0.95), [0.88, 0.92], Difference(0.2, 0.1, 0.3, 0.0004, 0), 0.0004),
        row("third", Figure(0.75, None, None), [0.7, 0.8], Difference(0.05, None, None, None, 0), None),
    ),
    units=40,
    files=50,
    patients=30,
    notes=(),
)


class Kept(Drawing):
    """Remembers the last that was made."""

    last: Kept

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        Kept.last = self


def lines_of(axes: Axes, marker: str, fillstyle: str = "full") -> list[tuple[list[float], list[float]]]:
    return [
        (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in axes.lines
        if line.get_marker() == marker and line.get_fillstyle() == fillstyle and line.get_linestyle() != ":"
    ]


def test_the_picture_shows_intervals_folds_and_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(picture, "Drawing", Kept)
    picture.draw(SUMMARY, tmp_path / "drawn.png")
    areas, differences = Kept.last.axes
    assert [label.get_text() for label in areas.get_yticklabels()] == ["one", "other", "third"]
    assert areas.yaxis_inverted()
    assert lines_of(areas, "o", "none") == [([0.65, 0.75], [0, 0]), ([0.88, 0.92], [1, 1]), ([0.7, 0.8], [2, 2])]
    assert lines_of(areas, "o") == [([0.7], [0]), ([0.9], [1]), ([0.75], [2])]
    assert lines_of(areas, "None") == [([0.6, 0.8], [0, 0]), ([0.85, 0.95], [1, 1])]
    assert lines_of(differences, "o") == [([0.2], [1]), ([0.05], [2])]
    assert lines_of(differences, "None") == [([0.1, 0.3], [1, 1])]
    dotted = [
        [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] for axes in (areas, differences)
    ]  # type: ignore[index]
    assert dotted == [[0.7], [0]]
    assert [text.get_text() for text in differences.texts if text.get_text()] == ["p < 0.001"]
    assert Kept.last.get_suptitle().startswith("50 files of 30 patients")


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_ending_chooses_the_format_and_no_figure_is_left_open(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"drawn.{suffix}"
    picture.draw(SUMMARY, path)
    assert path.read_bytes().startswith(start)
    assert pyplot.get_fignums() == []
