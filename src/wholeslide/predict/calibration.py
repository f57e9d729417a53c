"""The ranges that a run's 8-bit predictions are made with: observed once, on slides that it was trained on, and kept with it."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from wholeslide.errors import CohortError, Problem, RunError, SlideError
from wholeslide.model.network import LocalNetwork
from wholeslide.model.quantization import Calibration
from wholeslide.model.staged import StagedNetwork
from wholeslide.streaming.calibration import observe_slide
from wholeslide.train.checkpoint import Pointer, disk_errors, write_atomically
from wholeslide.train.run import Run
from wholeslide.train.views import ViewSource, entries

logger = logging.getLogger(__name__)

#: Of each class.
_SLIDES = 4
#: Of what is kept; ranges of another way to find them are found anew.
_FORMAT = {"format_version": "2"}
_NO_SLIDES = "the ranges of 8-bit numbers are found on training slides, which cannot be read"
_REMEDY = "run `wholeslide predict --precision int8` once where they are; the ranges are then kept in the run"


def calibration_path(run: Run) -> Path:
    """Where a run keeps its ranges."""
    return run.path / "calibration.safetensors"


def calibration_of(run: Run, loaded: tuple[StagedNetwork, Pointer] | None = None) -> Calibration:
    """The ranges of a checkpoint: those that are kept, or from the run's own training slides, and then kept.

    Args:
        run: the run.
        loaded: one of its checkpoints; left out: the best.

    Raises:
        RunError: there is no checkpoint; nothing is kept and none of the training slides can be read, or the disk is full.
        ConfigError: this processor has no integer kernels.
    """
    network, pointer = loaded or run.load_checkpoint("best")
    assert isinstance(network, LocalNetwork)
    calibration, checkpoint = Calibration(network), pointer.sha256
    if _load(calibration, calibration_path(run), checkpoint):
        return calibration
    source = ViewSource(run.slide_config, network.padded_size, run.config.cache)
    problems: list[Problem] = []
    try:
        training = run.cohort().split("train")
    except CohortError as error:
        raise RunError([Problem(_NO_SLIDES, str(run.path), _REMEDY), *error.problems]) from error
    for _, of_class in training.groupby("label", sort=True):
        observed = 0
        for entry in entries(of_class):
            if observed == _SLIDES:
                break
            try:
                with closing(source.open(entry)) as view:
                    observe_slide(calibration, view)
            except SlideError as error:
                problems += error.problems
                continue
            observed += 1
    if calibration.is_empty:
        raise RunError([Problem(_NO_SLIDES, str(run.path), _REMEDY), *problems])
    try:
        with disk_errors(calibration_path(run)):
            write_atomically(calibration_path(run), save(calibration.state(), {**_FORMAT, "checkpoint": checkpoint}))
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): every prediction will look for the ranges anew", calibration_path(run), error
        )
    return calibration


def _load(calibration: Calibration, path: Path, checkpoint: str) -> bool:
    """Whether there were ranges of this checkpoint."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != {**_FORMAT, "checkpoint": checkpoint}:
                return False
        calibration.load_state(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        logger.warning("%s is damaged (%s), and made anew", path, error)
        return False
    return True
