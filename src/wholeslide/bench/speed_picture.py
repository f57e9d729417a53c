"""A picture of the seconds from file to prediction, beside the paper's Table 3."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wholeslide.bench.paper import TABLE_3
from wholeslide.bench.speed_ratios import AS_MEANT, OURS_IS, THEIRS_IS, Ratio, Row, label, ratios
from wholeslide.geometry import Size

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 12, 6.5, 150
_NOTE_CHARACTERS = 150
#: Of the distance between two slides, what their bars take.
_FILLED = 0.86
_PAPER_GREY = "0.7"

Slide = tuple[Size, float]


def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; its format is the file's ending.

    Seconds at the left: a bar for each way of predicting, its computing alone and its reading alone marked in it. At the right how
    many times as long GABMIL takes as the local network, and the paper's.

    Args:
        rows: of ``bench speed``, one or more of them measured.
        path: PNG, SVG or PDF.
    """
    measured = [row for row in rows if row.get("measured", True)]
    slides = sorted({_slide(row) for row in measured}, key=lambda slide: (slide[0].area, -slide[1]))
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    seconds, times = figure.subplots(1, 2)
    _draw_seconds(seconds, measured, slides)
    _draw_ratios(times, ratios(measured), slides)
    lines = [line for note in (OURS_IS, THEIRS_IS) for line in textwrap.wrap(note, _NOTE_CHARACTERS)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.02, ha="left")
    figure.savefig(path)


def _draw_seconds(axes: Axes, rows: Sequence[Row], slides: list[Slide]) -> None:
    labels = list(dict.fromkeys(label(row) for row in rows))
    colours = colormaps["viridis"](np.linspace(0.1, 0.9, len(labels)))
    width = _FILLED / len(labels)
    for index, name in enumerate(labels):
        own = {_slide(row): row for row in rows if label(row) == name}
        places = _places(slides, index, width, [slide for slide in slides if slide in own])
        found = [own[slide] for slide in slides if slide in own]
        bars = axes.bar(places, [r["total_seconds"] for r in found], width * 0.94, color=colours[index], label=name)
        axes.bar_label(bars, labels=[f"{r['total_seconds']:.3g}" for r in found], fontsize=6, padding=1)
        for part, marker in (("compute", "_"), ("read", "x")):
            axes.scatter(places, [r[f"{part}_seconds"] for r in found], marker=marker, s=16, color="black", zorder=3)
    axes.set_yscale("log")
    axes.set_ylabel("seconds (– computing alone, × reading alone)")
    axes.set_title("From a file to its prediction, on this CPU")
    _finish(axes, slides)


def _draw_ratios(axes: Axes, found: Sequence[Ratio], slides: list[Slide]) -> None:
    labels = list(dict.fromkeys(_pair(ratio) for ratio in found))
    colours = colormaps["plasma"](np.linspace(0.1, 0.85, max(1, len(labels))))
    width = _FILLED / (len(labels) + 1)
    for index, name in enumerate(labels):
        own = {(r.size, r.tissue_fraction): r.total for r in found if _pair(r) == name}
        places = _places(slides, index, width, [slide for slide in slides if slide in own])
        values = [own[slide] for slide in slides if slide in own]
        bars = axes.bar(places, values, width * 0.94, color=colours[index], label=name)
        axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], fontsize=6, padding=1)
    theirs = {slide: TABLE_3[slide[0]] for slide in slides if slide[0] in TABLE_3 and slide[1] == 1}
    values = [theirs[slide].total / theirs[slide].local for slide in slides if slide in theirs]
    if values:
        places = _places(slides, len(labels), width, list(theirs))
        bars = axes.bar(places, values, width * 0.94, color=_PAPER_GREY, hatch="//", label="paper (GPU)")
        axes.bar_label(bars, labels=[f"{value:.1f}" for value in values], fontsize=6, padding=1)
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.set_ylabel("times as long")
    axes.set_title("GABMIL over the local network")
    _finish(axes, slides)


def _pair(ratio: Ratio) -> str:
    local = ratio.local if ratio.kind == AS_MEANT else ratio.local.split()[0]
    return f"{ratio.gabmil} over {local}"


def _places(slides: list[Slide], index: int, width: float, own: list[Slide]) -> list[float]:
    """Where the bars of one way stand, a bar for each of its slides."""
    return [slides.index(slide) - _FILLED / 2 + (index + 0.5) * width for slide in own]


def _finish(axes: Axes, slides: list[Slide]) -> None:
    names = [
        f"{size.width} × {size.height}" + (f"\n{fraction:.0%} tissue" if fraction < 1 else "")
        for size, fraction in slides
    ]
    axes.set_xticks(range(len(slides)), names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the bars


def _slide(row: Row) -> Slide:
    return Size(row["width"], row["height"]), row["tissue_fraction"]
