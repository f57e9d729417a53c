"""A picture of memory in percent of end to end, beside the paper's Table 2."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wholeslide.bench.comparison import EXTRAPOLATED_IS, OURS_IS, THEIRS_IS, Share
from wholeslide.bench.paper import TABLE_2, share_of_end_to_end
from wholeslide.geometry import Size

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 10, 6, 150
_NOTE_CHARACTERS = 135
_PAPER_GREYS = {4: "0.55", 8: "0.75"}
#: Of the distance between two sizes, what their bars take.
_FILLED = 0.86


def draw_shares(shares: Sequence[Share], path: Path) -> None:
    """Write the picture; its format is the file's ending.

    Args:
        shares: from :func:`~wholeslide.bench.comparison.shares_of_end_to_end`, some of them with a percentage.
        path: PNG, SVG or PDF.
    """
    ours = [share for share in shares if not share.end_to_end and share.of_end_to_end is not None]
    sizes = sorted({share.size for share in ours}, key=lambda size: size.area)
    labels = list(dict.fromkeys(share.label for share in ours))
    theirs = [stages for stages in _PAPER_GREYS if any(size in TABLE_2 for size in sizes)]
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    width = _FILLED / max(1, len(labels) + len(theirs))
    colours = colormaps["viridis"](np.linspace(0.15, 0.8, max(1, len(labels))))
    for index, label in enumerate(labels):
        heights = {share.size: share for share in ours if share.label == label}
        texts = [
            _percent(heights[size].of_end_to_end, heights[size].extrapolated) if size in heights else ""
            for size in sizes
        ]
        values = [_number(heights[size].of_end_to_end) if size in heights else 0.0 for size in sizes]
        _bars(axes, index, width, values, texts, f"ours (CPU): {label}", colours[index])
    for index, stages in enumerate(theirs, start=len(labels)):
        found = [share_of_end_to_end(size, stages) for size in sizes]
        texts = [_percent(value, extrapolated=False) if value is not None else "" for value in found]
        _bars(
            axes,
            index,
            width,
            [_number(v) for v in found],
            texts,
            f"paper (GPU): K = {stages}",
            _PAPER_GREYS[stages],
            "//",
        )
    _finish(figure, axes, sizes, any(share.extrapolated for share in ours))
    figure.savefig(path)


def _bars(
    axes: Axes,
    index: int,
    width: float,
    values: list[float],
    texts: list[str],
    label: str,
    colour: object,
    hatch: str | None = None,
) -> None:
    """One bar for each size, with its text above."""
    places = np.arange(len(values)) - _FILLED / 2 + (index + 0.5) * width
    bars = axes.bar(places, [100 * value for value in values], width * 0.94, label=label, color=colour, hatch=hatch)
    axes.bar_label(bars, labels=texts, fontsize=8, padding=2)


def _finish(figure: Figure, axes: Axes, sizes: list[Size], extrapolated: bool) -> None:
    axes.axhline(100, color="black", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(sizes)), [f"{size.width} × {size.height}" for size in sizes])
    axes.set_xlabel("slide (pixels)")
    axes.set_ylabel("memory, in % of end to end in one piece")
    axes.set_title("Memory of one training step, in percent of end-to-end training")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    notes = [OURS_IS, THEIRS_IS, *([EXTRAPOLATED_IS] if extrapolated else [])]
    lines = [line for note in notes for line in textwrap.wrap(note, _NOTE_CHARACTERS)]
    figure.supxlabel("\n".join(lines), fontsize=8, x=0.02, ha="left")


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


def _percent(value: float | None, extrapolated: bool) -> str:
    return "" if value is None else f"{100 * value:.1f}%" + "*" * extrapolated
