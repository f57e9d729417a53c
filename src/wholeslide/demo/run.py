"""The demonstration from end to end: make slides, train on them, score, and show that the controls fail."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wholeslide import __version__
from wholeslide.demo.cohort import DemoCohortConfig, write_cohort
from wholeslide.demo.controls import Control, run_controls
from wholeslide.errors import RunError
from wholeslide.predict import evaluate_run
from wholeslide.train.checkpoint import disk_errors
from wholeslide.train.config import TrainConfig
from wholeslide.train.loop import train

logger = logging.getLogger(__name__)

MARK = "demo.json"
"""Written first and last into a demonstration's folder: it says whose folder it is, and then what was found."""
_MADE = ("slides", "run")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demonstration found.

    ``auroc`` is the whole-slide network's on ``test_slides`` slides, with its 95% interval ``auroc_low`` to
    ``auroc_high``; ``seconds`` the time of each part.
    """

    run_dir: Path
    test_slides: int
    auroc: float
    auroc_low: float
    auroc_high: float
    controls: list[Control]
    seconds: dict[str, float]

    def lines(self) -> list[str]:
        """What is printed."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [
            f"Whole-slide network: test AUROC {self.auroc:.3f} "
            f"(95% interval {self.auroc_low:.3f} to {self.auroc_high:.3f}, {self.test_slides} slides)",
            "Controls that cannot see the arrangement, and so must stay near 0.5:",
            *(f"  {control.name}: AUROC {control.auroc:.3f} ({control.slides} slides)" for control in self.controls),
            f"Time: {parts}",
            f"The run is in {self.run_dir}: metrics/test.json, predictions/test.csv, log/",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the run's folder relative to the demonstration's."""
        return {**asdict(self), "run_dir": self.run_dir.name}


def demo(
    out: Path, seed: int = 0, *, cohort: DemoCohortConfig | None = None, epochs: int = 5, control_pairs: int = 104
) -> DemoResult:
    """Run the demonstration in the folder ``out``; an earlier demonstration there is replaced.

    Args:
        out: Folder that gets ``slides/``, ``manifest.csv``, the run in ``run/`` and ``demo.json``.
        seed: Seed of the slides, of the training and of the controls.
        cohort: What is generated; by default 116 slides of more than 1000 pixels a side. Its seed is not used.
        epochs: Passes over the training slides.
        control_pairs: Pairs of slides that the controls are given.

    Raises:
        RunError: ``out`` holds something else than an earlier demonstration, or the disk is full.
    """
    _claim(out, seed)
    seconds: dict[str, float] = {}
    cohort_config = DemoCohortConfig(seed=seed) if cohort is None else cohort
    with _timed("slides", seconds), disk_errors(out):
        logger.info("writing %d synthetic slides to %s", 2 * len(cohort_config.splits), out / "slides")
        manifest = write_cohort(out, cohort_config)
    with _timed("training", seconds):
        run = train(train_config(manifest, out, seed=seed, epochs=epochs))
    with _timed("evaluation", seconds):
        found = evaluate_run(run.path, "test", quiet=False)
    with _timed("controls", seconds):
        logger.info("training the two controls on %d small slides", 2 * control_pairs)
        controls = run_controls(seed, pairs=control_pairs)
    auroc = found["auroc"]
    result = DemoResult(
        run_dir=run.path,
        test_slides=found["n"],
        auroc=auroc["value"],
        auroc_low=auroc["low"],
        auroc_high=auroc["high"],
        controls=controls,
        seconds=seconds,
    )
    _write_mark(out, {"version": __version__, "seed": seed, **result.to_dict()})
    return result


def train_config(manifest: Path, out: Path, *, seed: int, epochs: int) -> TrainConfig:
    """timm's smallest ResNet from random weights, at rates of its own: quick, and needs nothing from the internet."""
    return TrainConfig(
        manifest=manifest,
        slides=out / "slides",
        out=out / "run",
        backbone="test_resnet",
        weights="random",
        first_stride=2,
        stages=4,
        reconstruction_regions=4,
        reconstruction_region_px=256,
        lr=1e-3,
        head_lr=5e-4,
        weight_decay=1e-2,
        accumulate=1,
        epochs=epochs,
        lr_schedule="constant",
        patience=0,
        group="pair",
        seed=seed,
        loggers=("csv", "tensorboard"),
    )


def _claim(out: Path, seed: int) -> None:
    """Make the folder, or empty it of an earlier demonstration; nothing else in it is touched."""
    if out.exists() and not out.is_dir():
        raise RunError.single("not a folder", where=str(out), remedy="name another one with --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise RunError.single(
                "the folder is not empty and no demonstration's", where=str(out), remedy="name another one with --out"
            )
        for name in _MADE:
            shutil.rmtree(out / name, ignore_errors=True)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        _write_mark(out, {"version": __version__, "seed": seed})


def _write_mark(out: Path, found: dict[str, Any]) -> None:
    (out / MARK).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - began, 1)
