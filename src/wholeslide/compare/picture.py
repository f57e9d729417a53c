"""A picture of the comparison: every method's AUROC, with its folds, and its difference to the reference, with intervals."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from wholeslide.compare.summary import Figure, Row, Summary
from wholeslide.compare.tables import p_text

_WIDTH_INCHES, _ROW_INCHES, _DOTS_PER_INCH = 10, 0.4, 150
_REFERENCE, _OTHER, _FOLD = "black", "tab:blue", "0.6"


def draw(summary: Summary, path: Path) -> None:
    """Write the picture; its format is the file's ending.

    Small rings are single trainings on their folds; the dotted line at the left is the reference's AUROC.

    Args:
        summary: with one complete method at least.
        path: PNG, SVG or PDF.
    """
    rows = [row for row in summary.rows if row.figures]
    height = 1.6 + _ROW_INCHES * len(rows)
    drawing = Drawing(figsize=(_WIDTH_INCHES, height), dpi=_DOTS_PER_INCH, layout="constrained")
    areas, differences = drawing.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        of_folds = [found.values["auroc"] for found in row.by_fold]
        areas.plot(of_folds, [place] * len(of_folds), "o", color=_FOLD, markersize=4, fillstyle="none")
        _whisker(areas, place, row.figures["auroc"], row)
        if row.reference:
            areas.axvline(row.figures["auroc"].value, color=_REFERENCE, linewidth=0.8, linestyle=":")
        if row.difference is not None:
            found = row.difference
            _whisker(differences, place, Figure(found.value, found.low, found.high), row)
            told = "" if row.p_holm is None else f"p = {p_text(row.p_holm)}".replace("= <", "< ")
            differences.annotate(told, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    areas.set_yticks(range(len(rows)), [row.method for row in rows])
    areas.set_ylim(len(rows) - 0.5, -0.5)
    areas.set_xlabel("AUROC: mean over folds, and of each training (rings)")
    reference = next(row.method for row in summary.rows if row.reference)
    differences.set_xlabel(f"AUROC less that of {reference}; p by Holm")
    differences.axvline(0, color=_REFERENCE, linewidth=0.8, linestyle=":")
    for axes in (areas, differences):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    drawing.suptitle(f"{summary.files} files of {summary.patients} patients; 95% intervals over patients", fontsize=10)
    drawing.savefig(path)


def _whisker(axes: Axes, place: int, figure: Figure, row: Row) -> None:
    colour = _REFERENCE if row.reference else _OTHER
    if figure.low is not None and figure.high is not None:
        axes.plot([figure.low, figure.high], [place, place], color=colour, linewidth=1.5)
    axes.plot([figure.value], [place], "o", color=colour, markersize=5)
