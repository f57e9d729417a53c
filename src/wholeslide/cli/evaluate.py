"""``wholeslide evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wholeslide.cli.command import Command
from wholeslide.cli.output import print_json, print_table, write
from wholeslide.cli.report import draw_after
from wholeslide.errors import ConfigError, Problem
from wholeslide.slides.config import Decoders


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Which run is scored, on what.

    Args:
        run: The run directory.
        split: The split of the run's own cohort that is scored; left out: test.
        manifest: CSV of another labelled cohort, to be scored in place of a split.
        name: What the other cohort is called in the run; left out: as its manifest.
        slides: Folder of the slides: those of the other cohort, or the run's own if they have been moved since the training.
        decoders: Where files are decoded: in threads; in processes, so that a decoder that crashes on a damaged file costs
            that slide only; or auto, as for train. Left out: as in training.
        memory: Most memory to use, as 8GiB; left out: as in training.
        json: Write JSON.
        quiet: No progress bar.
    """

    run: Path
    split: Literal["test", "valid", "train"] | None = None
    manifest: Path | None = None
    name: str | None = None
    slides: Path | None = None
    decoders: Decoders | None = None
    memory: str | None = None
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.manifest is None and self.name is not None:
            problems.append(Problem("a name of no cohort", "--name", "give --manifest, too"))
        if self.manifest is not None and self.split is not None:
            problems.append(Problem("two cohorts", "--manifest and --split", "give one of the two"))
        if self.manifest is not None and self.slides is None:
            problems.append(Problem("no folder of slides", "--manifest", "give the other cohort's with --slides"))
        if problems:
            raise ConfigError(problems)


def run(arguments: EvaluateArguments) -> int:
    """Score, and show the numbers."""
    from wholeslide.predict import evaluate_external, evaluate_run

    how: dict[str, Any] = {"decoders": arguments.decoders, "memory": arguments.memory, "quiet": arguments.quiet}
    if arguments.manifest is not None:
        assert arguments.slides is not None
        found = evaluate_external(arguments.run, arguments.manifest, arguments.slides, name=arguments.name, **how)
    else:
        found = evaluate_run(arguments.run, arguments.split or "test", slides=arguments.slides, **how)
    draw_after(arguments.run, split=found["split"])
    if arguments.json:
        print_json(found)
        return 0
    _show(found)
    write(f"Numbers: {arguments.run / 'metrics' / found['split']}.json")
    write(f"Report: {arguments.run / 'report.html'}")
    write(f"Predictions: {arguments.run / 'predictions' / found['split']}*.csv")
    return 0


def _show(found: dict[str, Any]) -> None:
    from wholeslide.metrics import METRICS

    title = f"{found['split']}: {found['n']} {found['unit']}s"
    if found["unit"] != "patient":
        title += f" of {found['patients']} patients"
    rows = [[name.replace("_", " "), *_interval(found[name])] for name in METRICS]
    print_table(["metric", "value", "95% interval"], rows, title=title)
    stages = [
        [entry["stage"], _value(entry["accuracy"]), _value(entry["balanced_accuracy"]), _value(entry["auroc"])]
        for entry in found["stages"]
    ]
    print_table(["stage", "accuracy", "balanced accuracy", "auroc"], stages, title="Each stage's own classifier")
    classes = found["confusion"]["classes"]
    counts = found["confusion"]["value"]
    rows = [[name, *(str(int(count)) for count in line)] for name, line in zip(classes, counts, strict=True)]
    print_table(["truth \\ prediction", *classes], rows, title="Confusion")
    if found.get("note"):
        write(str(found["note"]))


def _interval(metric: dict[str, Any]) -> list[str]:
    if metric["value"] is None:
        return ["-", str(metric.get("reason", ""))]
    return [f"{metric['value']:.3f}", _bounds(metric)]


def _bounds(metric: dict[str, Any]) -> str:
    return "" if metric["low"] is None else f"{metric['low']:.3f} to {metric['high']:.3f}"


def _value(metric: dict[str, Any]) -> str:
    return "-" if metric["value"] is None else f"{metric['value']:.3f}"


COMMAND = Command(
    name="evaluate",
    summary="Score a run on its test split, or on another cohort, with 95% intervals.",
    arguments=EvaluateArguments,
    positionals=("run",),
    run=run,
    example="wholeslide evaluate runs/first",
)
