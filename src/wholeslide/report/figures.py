"""The figures of a report, as SVG to be put into a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wholeslide.metrics import METRICS, aggregate
from wholeslide.report.bands import Curve, precision_recall, roc
from wholeslide.report.facts import RunFacts, Scores

_WIDTH_INCHES, _HEIGHT_INCHES = 5.6, 3.6
_BINS = 10
_RESAMPLES = 500
_MOST_CLASSES = 6
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawn:
    """A figure: what it shows, how to read it, and itself."""

    title: str
    caption: str
    svg: str


def learning_curves(facts: RunFacts) -> list[Drawn]:
    """Losses and validation of every stage, over epochs; those that the log has."""
    drawn = []
    wanted = (
        ("Classification loss", "classification_loss", "", "cross-entropy (nats)", "of the training slides"),
        ("Reconstruction loss", "reconstruction_loss", "", "L1", "of the training slides; the last stage has none"),
        ("Validation loss", "loss", "valid_", "cross-entropy (nats)", "of the validation split"),
        ("Validation AUROC", "auroc", "valid_", "AUROC", "of the validation split"),
        ("Validation accuracy", "balanced_accuracy", "valid_", "balanced accuracy", "of the validation split"),
    )
    for title, ending, prefix, unit, of_what in wanted:
        columns = {stage: f"{prefix}stage{stage}_{ending}" for stage in range(1, facts.stages + 1)}
        lines = {
            stage: facts.epochs[column]
            for stage, column in columns.items()
            if column in facts.epochs and facts.epochs[column].notna().any()
        }
        if not lines:
            continue
        figure, axes = _canvas()
        colours = colormaps["viridis"](np.linspace(0.05, 0.85, facts.stages))
        for stage, values in lines.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", color=colours[stage - 1], label=f"stage {stage}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(unit)
        if facts.stages > 1:
            axes.legend()
        drawn.append(Drawn(title, f"{title} {of_what}, a line a stage.", _svg(figure, title)))
    return drawn


def score_figures(scores: Scores) -> list[Drawn]:
    """ROC, precision-recall, calibration, confusion, and accuracy by depth."""
    classes, unit = scores.metrics["classes"], scores.metrics["unit"]
    units = aggregate(scores.predictions, unit, classes)
    units = units[units["label"] != ""].reset_index(drop=True)
    if units.empty:
        return []
    shown = classes[-1:] if len(classes) == 2 else classes[:_MOST_CLASSES]
    note = f"{len(units)} {unit}s; the bands hold 95% of {_RESAMPLES} resamples of the patients."
    curves = [
        ("ROC", roc, "1 − specificity", "sensitivity"),
        ("Precision and recall", precision_recall, "recall", "precision"),
    ]
    drawn = []
    for title, of, x, y in curves:
        found = {name: curve for name in shown if (curve := of(units, name, resamples=_RESAMPLES)) is not None}
        if found:
            drawn.append(_draw_curves(title, found, x, y, note, diagonal=title == "ROC"))
    drawn.append(_draw_calibration(units, classes, scores.metrics["calibration_error"]))
    drawn.append(_draw_confusion(scores.metrics["confusion"], unit))
    if len(scores.metrics.get("stages", ())) > 1:
        drawn.append(_draw_depth(scores.metrics["stages"]))
    return drawn


def _draw_curves(title: str, curves: Mapping[str, Curve], x: str, y: str, note: str, *, diagonal: bool) -> Drawn:
    figure, axes = _canvas()
    for name, curve in curves.items():
        (line,) = axes.plot(curve.x, curve.y, drawstyle="default" if diagonal else "steps-pre", label=name)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.grid, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
    if diagonal:
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(title="class")
    return Drawn(title, f"{title} of a class against the rest. {note}", _svg(figure, title))


def _draw_calibration(units: pd.DataFrame, classes: Sequence[str], error: Mapping[str, float | None]) -> Drawn:
    probabilities = units[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
    confidence = probabilities.max(axis=1)
    correct = np.asarray(classes, dtype=object)[probabilities.argmax(axis=1)] == units["label"].to_numpy()
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    counts = np.bincount(place, minlength=_BINS)
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    there = np.flatnonzero(counts)
    axes.plot([confidence[place == one].mean() for one in there], [correct[place == one].mean() for one in there], "o-")
    axes.set(ylabel="right", ylim=(-0.05, 1.05))
    below.bar((np.arange(_BINS) + 0.5) / _BINS, counts, width=0.9 / _BINS, color="0.6")
    below.set(xlabel="probability of the prediction", ylabel="n", xlim=(0, 1))
    value = error["value"]
    said = "" if value is None else f" Expected calibration error {value:.3f}."
    caption = f"How often predictions of a probability are right, and how many there are (n = {len(units)}).{said}"
    return Drawn("Calibration", caption, _svg(figure, "Calibration"))


def _draw_confusion(confusion: Mapping[str, Sequence[object]], unit: str) -> Drawn:
    counts, classes = np.asarray(confusion["value"], dtype=int), [str(name) for name in confusion["classes"]]
    figure, axes = _canvas()
    axes.grid(visible=False)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=0 if len(classes) < 5 else 45)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="prediction", ylabel="truth")
    return Drawn("Confusion", f"Counts of {unit}s; the shade is the share of a row.", _svg(figure, "Confusion"))


def _draw_depth(stages: Sequence[Mapping[str, Any]]) -> Drawn:
    figure, axes = _canvas()
    depths = np.arange(1, len(stages) + 1)
    for shift, name in ((-0.06, "balanced_accuracy"), (0.06, "auroc")):
        assert name in METRICS
        found = [(depth, stage[name]) for depth, stage in zip(depths, stages, strict=True)]
        known = [(depth + shift, one) for depth, one in found if one["value"] is not None]
        (line,) = axes.plot(
            [d for d, _ in known], [one["value"] for _, one in known], "o-", label=name.replace("_", " ")
        )
        for depth, one in known:
            if one["low"] is not None and one["high"] is not None:
                axes.plot([depth, depth], [one["low"], one["high"]], color=line.get_color(), linewidth=1)
    axes.set_xticks(depths)
    axes.set(xlabel="stage", ylabel="on this split")
    axes.legend()
    caption = (
        "Every stage has a classifier of its own; the last one's answer is the run's. 95% intervals over patients."
    )
    return Drawn("By depth", caption, _svg(figure, "By depth"))


def _canvas() -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Figure, title: str) -> str:
    """The ``<svg>`` element alone; its inner names are the figure's own, so that several can stand on one page."""
    written = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    name = title.lower().replace(" ", "-")
    found = text[text.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    return found.replace('xlink:href="#', f'xlink:href="#{name}-').replace("<svg ", '<svg role="img" ', 1)
