"""The result as a table in the paper's layout: method, accuracy, AUROC, then the rest. Markdown, LaTeX, and CSV in full."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from wholeslide.compare.summary import Figure, Row, Summary
from wholeslide.metrics import LOWER_IS_BETTER, METRICS
from wholeslide.train.tables import amount, clock

N = TypeVar("N", int, float)

SHOWN = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}
"""The metrics of the printed tables, in the order of their columns."""
NOTHING = "–"
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "<": "$<$",
}
_TEX |= {sign: "\\" + sign for sign in "&%$#_{}"}
_TEX_SIGNS = re.compile("[" + re.escape("".join(_TEX)) + "]")


def columns_of(summary: Summary) -> list[str]:
    """The heads of the printed table."""
    heads = ["method", *SHOWN.values(), "AUROC − reference", "p", "p (Holm)"]
    if any(row.delong is not None for row in summary.rows):
        heads.append("p (DeLong)")
    return [*heads, "training", "peak memory", "trained weights"]


def cells_of(summary: Summary) -> list[list[str]]:
    """The printed table's texts, a row a method; the best value of each metric stands between stars."""
    best = {name: _best(summary.rows, name) for name in SHOWN}
    return [_cells(row, best, columns_of(summary)) for row in summary.rows]


def markdown(summary: Summary, notes: Sequence[str]) -> str:
    """The table with its notes below."""
    heads = columns_of(summary)
    lines = [_pipes(heads), _pipes(["---", *["---:"] * (len(heads) - 1)])]
    lines += [_pipes([text.replace("|", "\\|") for text in row]) for row in cells_of(summary)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def latex(summary: Summary, notes: Sequence[str]) -> str:
    """The table for a paper, with the package booktabs; its notes are comments."""
    heads = columns_of(summary)
    lines = [f"% {note}" for note in notes]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, heads)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_tex, row)) + r" \\" for row in cells_of(summary)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def comma_separated(summary: Summary) -> str:
    """Every number in full; a float reads back bit by bit. What is not known is empty."""
    text = io.StringIO()
    rows = [_record(row) for row in summary.rows]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
    return text.getvalue()


def _record(row: Row) -> dict[str, object]:
    record: dict[str, object] = {
        "method": row.method,
        "reference": int(row.reference),
        "complete": int(not row.reasons and bool(row.figures)),
        "trainings": row.cost.trainings,
    }
    for name in METRICS:
        figure = row.figures.get(name)
        record[name] = figure.value if figure else None
        record[f"{name}_low"], record[f"{name}_high"] = (figure.low, figure.high) if figure else (None, None)
    found, classical = row.difference, row.delong
    record |= {
        "auroc_difference": found.value if found else None,
        "auroc_difference_low": found.low if found else None,
        "auroc_difference_high": found.high if found else None,
        "p": found.p if found else None,
        "p_holm": row.p_holm,
        "delong_p": classical.p if classical else None,
        "train_seconds": row.cost.train_seconds,
        "cpu_seconds": row.cost.cpu_seconds,
        "test_seconds": row.cost.test_seconds,
        "peak_bytes": row.cost.peak_bytes,
        "peak_device_bytes": row.cost.peak_device_bytes,
        "trained_parameters": row.cost.trained_parameters,
        "reasons": "; ".join(row.reasons),
    }
    return record


def _cells(row: Row, best: dict[str, float], heads: Sequence[str]) -> list[str]:
    name = row.method + (" (reference)" if row.reference else "")
    cost = row.cost
    peak = cost.peak_device_bytes if cost.peak_device_bytes is not None else cost.peak_bytes
    costs = [_or_nothing(cost.train_seconds, clock), _or_nothing(peak, amount)]
    costs.append(_or_nothing(cost.trained_parameters, lambda count: f"{count:,}"))
    if not row.figures:
        return [f"{name}: incomplete", *[NOTHING] * (len(heads) - 4), *costs]
    figures = [_interval(row.figures[metric], starred=row.figures[metric].value == best[metric]) for metric in SHOWN]
    found = row.difference
    tests = [_interval(Figure(found.value, found.low, found.high), signed=True) if found else NOTHING]
    tests += [_or_nothing(found.p if found else None, p_text), _or_nothing(row.p_holm, p_text)]
    if "p (DeLong)" in heads:
        tests.append(p_text(row.delong.p) if row.delong else NOTHING)
    return [name, *figures, *tests, *costs]


def p_text(value: float) -> str:
    """A p value with two digits, or below what the resamples can tell."""
    return "<0.001" if value < 0.001 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _interval(figure: Figure, *, starred: bool = False, signed: bool = False) -> str:
    value = f"{figure.value:+.4f}" if signed else f"{figure.value:.4f}"
    value = f"**{value}**" if starred else value
    if figure.low is None or figure.high is None:
        return value.replace("-", "−")
    sign = "+" if signed else ""
    return f"{value} ({figure.low:{sign}.4f} to {figure.high:{sign}.4f})".replace("-", "−")


def _best(rows: Sequence[Row], metric: str) -> float:
    values = [row.figures[metric].value for row in rows if row.figures]
    return (min if metric in LOWER_IS_BETTER else max)(values, default=float("nan"))


def _or_nothing(value: N | None, text: Callable[[N], str]) -> str:
    return NOTHING if value is None else text(value)


def _pipes(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _tex(text: str) -> str:
    bold = re.fullmatch(r"\*\*(.+?)\*\*(.*)", text)
    if bold:
        return rf"\textbf{{{_tex(bold[1])}}}{_tex(bold[2])}"
    return _TEX_SIGNS.sub(lambda sign: _TEX[sign[0]], text)
