"""From a run's folder to one page of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from wholeslide.baselines.registry import method_info
from wholeslide.bench.environment import machine
from wholeslide.errors import Problem, RunError, WholeslideError
from wholeslide.explain import explain_cohort, explanations_of
from wholeslide.metrics import LOWER_IS_BETTER, METRICS
from wholeslide.report.facts import RunFacts
from wholeslide.report.figures import learning_curves, score_figures
from wholeslide.report.pictures import Picture, picture_of
from wholeslide.train.checkpoint import disk_errors, write_atomically

PAPER = (
    "Zhang J., Zhang X., Ma K., Gupta R., Saltz J., Vakalopoulou M., Samaras D.: Gigapixel Whole-Slide Images "
    "Classification using Locally Supervised Learning. MICCAI 2022."
)
NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """Where the page is, and what of it could not be done."""

    path: Path
    problems: tuple[Problem, ...]


def report(
    run_dir: Path,
    *,
    split: str = "test",
    pictures: int = 0,
    slides: Path | None = None,
    pixels: Path | None = None,
    out: Path | None = None,
    quiet: bool = True,
) -> Report:
    """Write the report of a run.

    Args:
        run_dir: The run.
        split: Which of its scores are shown; where it has none of this name, the page says so.
        pictures: How many slides are explained for the page, those with the largest losses first; those that were
            explained before are shown in any case.
        slides: Folder of the run's slides; left out: where they were in training.
        pixels: Folder of the slides that features were made of, where the run was trained on such.
        out: The page; left out: ``report.html`` in the run.
        quiet: No progress bar.

    Raises:
        RunError: no such run, or damaged; the page cannot be written.
    """
    facts = RunFacts.read(run_dir, split)
    problems: list[Problem] = []
    if pictures and facts.scores is not None:
        problems += _explain(facts, pictures, slides, pixels, quiet=quiet)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    path = run_dir / NAME if out is None else out
    with disk_errors(path.parent):
        write_atomically(path, template.render(**_content(facts, split, problems)).encode())
    return Report(path, tuple(problems))


def _explain(facts: RunFacts, count: int, slides: Path | None, pixels: Path | None, *, quiet: bool) -> list[Problem]:
    """Explain the slides that are to be seen; what cannot be is told on the page and the others go on."""
    assert facts.scores is not None
    known = set(facts.cohort["file"])
    files = [file for file in facts.scores.by_loss["file"].head(count) if file in known]
    try:
        found = explain_cohort(facts.run.path, files, slides=slides, pixels=pixels, quiet=quiet)
    except WholeslideError as error:
        return list(error.problems)
    return list(found.errors)


def _content(facts: RunFacts, split: str, problems: list[Problem]) -> dict[str, Any]:
    run, scores = facts.run, facts.scores
    citation = method_info(run.config.method).citation
    shown = [] if scores is None else _slides(facts)
    return {
        "name": run.path.resolve().name,
        "split": split,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "scores": None if scores is None else scores.metrics,
        "metrics": [] if scores is None else _metrics(scores.metrics),
        "score_figures": [] if scores is None else score_figures(scores),
        "learning": learning_curves(facts),
        "slides": [slide for slide in shown if slide["picture"] is not None],
        "others": [slide for slide in shown if slide["picture"] is None],
        "problems": [str(problem) for problem in problems],
        "counts": facts.split_counts().to_dict("records") if len(facts.cohort) else [],
        "excluded": facts.excluded.to_dict("records"),
        "run_facts": _run_facts(facts),
        "machine": _machine(),
        "citations": list(dict.fromkeys([PAPER, *([citation] if citation else [])])),
    }


def _metrics(metrics: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name in METRICS:
        found = metrics[name]
        value = "–" if found["value"] is None else f"{found['value']:.3f}"
        bounds = "" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        why = found.get("reason") or ""
        rows.append({"name": name.replace("_", " "), "value": value, "bounds": bounds or why, "better": better})
    return rows


def _slides(facts: RunFacts) -> list[dict[str, Any]]:
    assert facts.scores is not None
    try:
        kept = explanations_of(facts.run.path)
    except RunError:  # scores without weights
        kept = {}
    found = []
    for row in facts.scores.by_loss.to_dict("records"):
        picture: Picture | None = picture_of(kept[row["file"]]) if row["file"] in kept else None
        unlabelled, unread = row["label"] == "", pd.isna(row["confidence"])
        found.append(
            {
                "file": row["file"],
                "label": row["label"] or "not labelled",
                "prediction": "could not be read" if unread else row["prediction"],
                "probability": "" if unread else f"{row['confidence']:.3f}",
                "loss": "" if pd.isna(row["loss"]) else f"{row['loss']:.3f}",
                "wrong": not unlabelled and not unread and row["label"] != row["prediction"],
                "picture": picture,
            }
        )
    return found


def _run_facts(facts: RunFacts) -> list[tuple[str, str]]:
    run, config, epochs, slides = facts.run, facts.run.config, facts.epochs, facts.slides
    target_mpp = run.slide_config.target_mpp
    scale = "pixels as stored" if target_mpp is None else f"{target_mpp:g} µm per pixel"
    found = [
        ("method", f"{config.method}, {facts.stages} stage{'s' if facts.stages > 1 else ''}"),
        ("backbone", f"{config.backbone}, weights: {Path(str(config.weights)).name}"),
        ("working resolution", scale),
        ("classes", ", ".join(run.classes)),
        ("seed", str(config.seed)),
        ("optimiser", f"{config.optimizer}, learning rate {config.lr:g}"),
    ]
    if len(epochs):
        found.append(("epochs", str(len(epochs))))
    if len(epochs) and "training_seconds" in epochs:
        found.append(("training time", f"{float(epochs['training_seconds'].iloc[-1]) / 3600:.2f} h"))
    if len(slides) and "memory_bytes" in slides:
        found.append(("memory in training, at most", f"{float(slides['memory_bytes'].max()) / 2**30:.2f} GiB"))
    if run.plan is not None:
        found.append(("largest slide", f"{run.plan.largest} working pixels"))
        found.append(("tiles of the stages", ", ".join(f"{px} px" for px in run.plan.tile_px)))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())))
    return found


def _machine() -> list[tuple[str, str]]:
    facts = machine()
    return [
        ("processor", f"{facts['processor']}, {facts['cores']} cores"),
        ("memory", f"{facts['memory_bytes'] / 2**30:.0f} GiB"),
        ("accelerator", facts["gpu"] or "none"),
        ("system", facts["system"]),
    ]
