"""``train`` and ``dry_run``: from a configuration to a trained run."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.fabric import Fabric

from wholeslide.cohort.manifest import Cohort
from wholeslide.errors import ConfigError, SlideError, StoreError
from wholeslide.model.staged import StagedNetwork
from wholeslide.slides.lock import alone_in
from wholeslide.train.checkpoint import disk_errors, write_atomically
from wholeslide.train.config import TrainConfig
from wholeslide.train.estimate import describe
from wholeslide.train.history import History, check_loggers, make_loggers
from wholeslide.train.run import Run, claim_folder
from wholeslide.train.setup import Prepared, choose_device, open_resumed, prefetch_limit, prepare_run
from wholeslide.train.signals import Interrupted, SignalWatch, watch_signals
from wholeslide.train.state import LoopState
from wholeslide.train.tables import plan_lines
from wholeslide.train.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Run:
    """Train a classifier on whole slides (the paper's algorithm, or one stage for end-to-end training).

    Everything is left in ``config.out``. With ``config.resume`` a run goes on exactly where it was saved last: on the
    CPU its final weights are bitwise those of a run that was never interrupted.

    Returns:
        The finished run.

    Raises:
        WholeslideError: what the user can mend, all of an input's problems together; where a slide can no longer be read,
            the state is saved.
        Interrupted: SIGINT or SIGTERM came; the state is saved, and ``exit_status`` is 130 or 143.
    """
    config = _complete(config)
    prepared = None if _goes_on(config) else prepare_run(config)
    for line in describe(prepared) if prepared is not None else ():
        logger.info("%s", line)
    with alone_in(config.out):
        # Another process may have begun a run here while the slides were checked.
        if prepared is None or claim_folder(config.out, resume=config.resume) == "resume":
            run, cohort = open_resumed(config)
            run.seal()
            network = run.build_network(pretrained=False)
            begun = run.checkpoints.pointer("last").state
        else:
            run, cohort, network, begun = _create(prepared), prepared.cohort, prepared.network, None
        with watch_signals() as watch:
            return _fit(run, cohort, network, begun, watch)


def dry_run(config: TrainConfig) -> list[str]:
    """Check everything and say what :func:`train` would do, as lines to print. Nothing is written.

    Raises:
        WholeslideError: what the user can mend, all of an input's problems together.
    """
    config = _complete(config)
    if not _goes_on(config):
        return describe(prepare_run(config))
    run, cohort = open_resumed(config)
    state = run.checkpoints.pointer("last").state
    return [
        f"would go on with {run.path} after {state.epochs_seen} epochs and {state.step} steps",
        f"{len(cohort.split('train'))} training and {len(cohort.split('valid'))} validation files",
        *([] if run.plan is None else plan_lines(run.plan)),
    ]


def _complete(config: TrainConfig) -> TrainConfig:
    """The same with absolute paths, and with the recipe of its method. One that does not exist is left to the full check."""
    config = config.with_absolute_paths()
    try:
        return config.resolved()
    except ConfigError:
        return config


def _goes_on(config: TrainConfig) -> bool:
    """Whether there is a run to go on with. What is wrong with the folder is left for the full check to report."""
    if not config.resume:
        return False
    config.check()
    check_loggers(config.loggers)
    return claim_folder(config.out, resume=True) == "resume"


def _create(prepared: Prepared) -> Run:
    run = Run.create(
        prepared.config,
        prepared.cohort,
        tissue=prepared.tissue,
        class_weights=prepared.class_weights,
        plan=prepared.plan,
        feature_width=prepared.feature_width,
    )
    if len(prepared.excluded):
        with disk_errors(run.path):
            write_atomically(run.path / "excluded.csv", prepared.excluded.to_csv(index=False).encode())
    return run


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what, remedy = f"the folder cannot be made: {error.strerror or error}", "name another"
        raise ConfigError.single(what, where=f"--features-cache {folder}", remedy=remedy) from error


def _fit(run: Run, cohort: Cohort, network: StagedNetwork, begun: LoopState | None, watch: SignalWatch) -> Run:
    """Train from the beginning (``begun`` is None) or from the last checkpoint; the run with the plan that it ends with."""
    config = run.config
    device = choose_device(config)
    first_slide = begun.slides_seen if begun else 0
    loggers = make_loggers(config.loggers, run.path / "log", run_name=run.path.name, first_step=first_slide)
    fabric = Fabric(accelerator=device.type, devices=1, loggers=loggers)
    fabric.launch()
    network.to(fabric.device)
    if config.features_cache is not None:
        _make_folder(config.features_cache)
    engine, source = run.learner(network, fabric.device), run.source(network)
    history = History(run.path / "log", loggers)
    trainer = Trainer(run, cohort, engine, source, history, watch, prefetch_bytes=prefetch_limit(config, fabric.device))
    if begun is not None:
        trainer.resume()
        logger.info("going on after %d epochs and %d steps", trainer.state.epochs_seen, trainer.state.step)
    else:
        trainer.save()
        run.seal()
    try:
        trainer.fit()
    except Interrupted as interruption:
        logger.warning("%s: saved after step %d, go on with --resume", interruption, trainer.state.step)
        raise
    except (SlideError, StoreError):
        trainer.save()
        logger.warning("saved after step %d, go on with --resume when it is mended", trainer.state.step)
        raise
    finally:
        history.close()
    return trainer.run
