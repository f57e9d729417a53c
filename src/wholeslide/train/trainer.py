"""Epochs of slides, steps of the optimiser, validation, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from wholeslide.baselines.registry import Recipe
from wholeslide.cohort.manifest import Cohort
from wholeslide.draws import Draws
from wholeslide.errors import RunError
from wholeslide.streaming.recovery import SlideMemoryError, memory_for, take_smaller_plan
from wholeslide.streaming.step import StepResult
from wholeslide.train.checkpoint import Pointer
from wholeslide.train.config import TrainConfig
from wholeslide.train.history import History
from wholeslide.train.inference import predict_slides
from wholeslide.train.learner import Learner, Source
from wholeslide.train.optim import RateSchedule, RateState, build_optimizer
from wholeslide.train.prefetch import Ready, read_ahead
from wholeslide.train.progress import memory_bytes, progress_bar, slide_note
from wholeslide.train.run import Run
from wholeslide.train.signals import SignalWatch
from wholeslide.train.state import Best, LoopState, RunningLosses
from wholeslide.train.validation import (
    constant_answer_loss,
    does_not_move,
    grows,
    monitored,
    stage_metrics,
)
from wholeslide.train.views import Entry, entries

logger = logging.getLogger(__name__)

T = TypeVar("T")

EARLY_LOOK = 3


@dataclass(frozen=True)
class TrainedSlide:
    """A slide whose gradients wait for the optimiser's step."""

    entry: Entry
    result: StepResult
    seconds: float
    wait_seconds: float
    memory_bytes: int


class Trainer:
    """Trains a network on a cohort, from ``state`` to the end.

    ``state`` always is that of the last optimiser step: it and the weights can be saved at any moment.
    """

    def __init__(
        self,
        run: Run,
        cohort: Cohort,
        engine: Learner[Any],
        source: Source[Any],
        history: History,
        watch: SignalWatch,
        *,
        prefetch_bytes: int,
    ) -> None:
        self.run = run
        self.config: TrainConfig = run.config
        self.network = engine.network
        self.engine = engine
        self.source = source
        self.history = history
        self.watch = watch
        self.prefetch_bytes = prefetch_bytes
        self.checkpoints = run.checkpoints
        self.training = entries(cohort.split("train"))
        self.validation = cohort.split("valid")
        counts = [sum(entry.label == name for entry in self.training) for name in run.classes]
        self.constant_loss = constant_answer_loss(counts, run.class_weights)
        self._begin(LoopState(stage=1 if self.config.in_turn else 0))
        self._saved_at = time.monotonic()
        watch.before_leaving = self.save

    @property
    def chosen_stages(self) -> list[int]:
        """The stages being trained, from 1."""
        return [self.state.stage] if self.state.stage else list(range(1, self.network.depth + 1))

    @property
    def _recipe(self) -> Recipe:
        return self.config.recipe(self.state.stage or 1)

    @property
    def stage_done(self) -> bool:
        """Whether the epochs of the stages being trained are over, or no longer improve them."""
        patience = self.config.patience
        stopped = patience > 0 and self.state.without_improvement >= patience
        return stopped or self.state.epoch >= self._recipe.epochs

    def resume(self) -> None:
        """Take up the last checkpoint.

        Raises:
            RunError: it is damaged.
        """
        state = self.checkpoints.pointer("last").state
        self._begin(state)
        self.checkpoints.restore("last", self.network, self.optimizer)
        self.checkpoints.roll_back(state)
        self.history.roll_back(state)

    def save(self) -> None:
        """Save what there is, now."""
        self.checkpoints.save(self.network, self.optimizer, self.state)
        self._saved_at = time.monotonic()

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal came, and the state was saved.
            RunError: a loss is not finite, the disk is full.
            SlideError: a slide can no longer be read, or memory does not suffice for it even with the smallest tiles; nothing
                is lost if :meth:`save` is called now.
            StoreError: features could not be kept on disk; likewise.
        """
        while not self.stage_done or self._next_stage():
            self._within_memory(self._train_epoch)
            self._finish_epoch()

    def _within_memory(self, part: Callable[[], T]) -> T:
        """Do a part of the loop; where memory does not suffice, with smaller tiles, from the last optimiser step on.

        As after a resume, which has the same plan: slides whose gradients were waiting are done again with the same draws, so that
        nothing is left of the slide that failed, and whether the run was resumed meanwhile makes no difference.
        """
        while True:
            try:
                return part()
            except SlideMemoryError as error:
                file, reason = error.file, error.reason
            plan = take_smaller_plan(self.engine, file, reason)
            self.prefetch_bytes = 0
            self.save()  # first: an earlier checkpoint was not followed by steps of the new plan
            self.run = self.run.with_plan(plan)

    def _begin(self, state: LoopState) -> None:
        """Train from a state on; the weights are the network's."""
        self.state = state
        self.optimizer = build_optimizer(self.network, self.config, state.stage or None)
        self.rates = RateSchedule(self.config, state.rate, stage=state.stage or 1)
        self.rates.apply(self.optimizer)

    def _next_stage(self) -> bool:
        """Freeze the stage as it was in its best epoch and turn to the next. False after the last."""
        if self.state.stage in (0, self.network.depth):
            return False
        best = self.checkpoints.pointer("best")
        self.checkpoints.restore("best", self.network)
        logger.info("stage %d is done, best in epoch %d", self.state.stage, best.state.epochs_seen)
        state = replace(
            self.state,
            stage=self.state.stage + 1,
            epoch=0,
            without_improvement=0,
            fresh_optimizer=True,
            best=None,
            rate=RateState(),
            losses=[],
        )
        self._begin(state)
        self.checkpoints.point("last", Pointer(best.file, best.sha256, state))
        self.checkpoints.forget_best()
        return True

    def _train_epoch(self) -> None:
        """What is left of the epoch. Ends at an optimiser step, so that no gradient crosses into the next."""
        order = epoch_order(self.config.seed, self.state.epochs_seen, len(self.training))
        items = [self.training[index] for index in order]
        description = f"epoch {self.state.epochs_seen + 1}"
        quiet = self.config.quiet
        self.optimizer.zero_grad(set_to_none=True)
        ahead = read_ahead(
            items[self.state.position :],
            lambda entry: self.source.open(entry, self._draws(entry)),
            name=lambda entry: entry.file,
            limit_bytes=self.prefetch_bytes,
        )
        group: list[TrainedSlide] = []
        bar = progress_bar(description, len(items), completed=self.state.position, quiet=quiet)
        with closing(ahead), bar as progress:
            for ready in ahead:
                size = min(self._recipe.accumulate, len(items) - self.state.position)
                with self.watch.interruptible():
                    slide = self._train_slide(ready, weight=1 / size)
                group.append(slide)
                progress.advance(slide_note(slide.seconds, slide.memory_bytes))
                if len(group) == size:
                    self._step(group)
                    group = []
        assert not group, "gradients left over"

    def _train_slide(self, ready: Ready[Entry, Any], *, weight: float) -> TrainedSlide:
        """Add one slide's gradients, times ``weight``."""
        entry = ready.item
        begin = time.perf_counter()
        label = self.run.classes.index(entry.label)
        stages = [self.state.stage] if self.state.stage else None
        with memory_for(entry.file), ready.view() as view:
            result = self.engine.step(view, label, self._draws(entry), weight=weight, stages=stages)
        self._check_losses(entry, result)
        seconds = time.perf_counter() - begin
        waited_seconds = ready.wait_seconds + self.engine.waited_seconds
        return TrainedSlide(entry, result, seconds, waited_seconds, memory_bytes(self.engine.device))

    def _draws(self, entry: Entry) -> Draws:
        return Draws(self.config.seed, self.state.epochs_seen, entry.file)

    def _step(self, group: Sequence[TrainedSlide]) -> None:
        """One step of the optimiser; from here on the group counts as trained."""
        self._check_gradients(group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state = self.state
        state.step += 1
        state.position += len(group)
        state.fresh_optimizer = False
        for slide in group:
            state.slides_seen += 1
            state.seconds += slide.seconds
            state.running.add(slide.result.classification_losses, slide.result.reconstruction_losses)
            self.history.slide(self._slide_row(slide))
        if time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes:
            self.save()

    def _slide_row(self, slide: TrainedSlide) -> dict[str, Any]:
        result = slide.result
        row: dict[str, Any] = {
            "slides_seen": self.state.slides_seen,
            "step": self.state.step,
            "epoch": self.state.epochs_seen + 1,
            "file": slide.entry.file,
            "seconds": round(slide.seconds, 3),
            "wait_seconds": round(slide.wait_seconds, 3),
            "memory_bytes": slide.memory_bytes,
        }
        row |= _by_stage("classification_loss", result.classification_losses)
        return row | _by_stage("reconstruction_loss", result.reconstruction_losses)

    def _check_losses(self, entry: Entry, result: StepResult) -> None:
        for stage in self.chosen_stages:
            losses = [result.classification_losses[stage - 1]]
            if self.network.reconstructs(stage):
                losses.append(result.reconstruction_losses[stage - 1])
            if not all(map(math.isfinite, losses)):
                raise self._not_finite("the loss", entry.file, stage)

    def _check_gradients(self, group: Sequence[TrainedSlide]) -> None:
        for stage in self.chosen_stages:
            parameters = [*self.network.backbone_parameters(stage), *self.network.head_parameters(stage)]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
                raise self._not_finite("a gradient", ", ".join(slide.entry.file for slide in group), stage)

    def _not_finite(self, what: str, files: str, stage: int) -> RunError:
        return RunError.single(
            f"{what} is no longer finite",
            where=f"{files}, stage {stage}, epoch {self.state.epochs_seen + 1}",
            remedy="begin anew with a lower --lr, or with --precision fp32",
        )

    def _finish_epoch(self) -> None:
        """Validate, decay the rates, keep the best, save."""
        state = self.state
        stage = state.stage or self.network.depth
        losses = state.running.epoch_loss(stage)
        metrics = self._within_memory(self._validate)
        score = monitored(metrics[stage], self.config.monitor)
        improved = score.better_than(state.best)
        file, sha256 = self.checkpoints.write(self.network, self.optimizer, state.step)
        row = self._epoch_row(metrics)
        state.epoch += 1
        state.epochs_seen += 1
        state.position = 0
        state.losses.append(losses)
        state.running = RunningLosses()
        state.without_improvement = 0 if improved else state.without_improvement + 1
        if improved:
            state.best = Best(score.value, score.loss, state.epochs_seen, state.step, file, sha256)
        if self.rates.epoch_end(epochs_done=state.epoch, improved=improved):
            logger.info("the learning rates are divided by ten")
        self.rates.apply(self.optimizer)
        self.history.epoch(row)
        if improved:
            self.checkpoints.point("best", Pointer(file, sha256, state))
        self.save()
        self._report(row, improved=improved)

    def _validate(self) -> dict[int, dict[str, float]]:
        """Loss and metrics of every stage's classifier on the validation split."""
        bar = progress_bar("validation", len(self.validation), quiet=self.config.quiet)
        with self.watch.interruptible(), bar as progress:
            _, by_stage = predict_slides(
                self.engine,
                self.validation,
                self.source,
                classes=self.run.classes,
                progress=progress,
                prefetch_bytes=self.prefetch_bytes,
                smaller_tiles=False,
            )
        return stage_metrics(by_stage, classes=self.run.classes, unit=self.config.unit)

    def _epoch_row(self, metrics: dict[int, dict[str, float]]) -> dict[str, Any]:
        state = self.state
        classification, reconstruction = state.running.means()
        row: dict[str, Any] = {
            "epochs_seen": state.epochs_seen + 1,
            "stage": state.stage,
            "step": state.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "head_lr": self.optimizer.param_groups[1]["lr"],
            "training_seconds": round(state.seconds, 3),
        }
        row |= _by_stage("classification_loss", classification) | _by_stage("reconstruction_loss", reconstruction)
        for stage, values in metrics.items():
            row |= {f"valid_stage{stage}_{name}": value for name, value in values.items()}
        return row

    def _report(self, row: dict[str, Any], *, improved: bool) -> None:
        state = self.state
        stage = state.stage or self.network.depth
        figures = [f"training loss {state.losses[-1].mean:.4f}"]
        figures += [
            f"validation {name} {row[f'valid_stage{stage}_{name}']:.4f}"
            for name in dict.fromkeys(("loss", self.config.monitor))
        ]
        logger.info("epoch %d: %s%s", state.epochs_seen, ", ".join(figures), " (best so far)" if improved else "")
        if state.epoch == 1 and math.isnan(row[f"valid_stage{stage}_{self.config.monitor}"]):
            logger.warning("%s is undefined on the validation split: choose another --monitor", self.config.monitor)
        looked_at = state.epoch == EARLY_LOOK or self.stage_done
        if looked_at and grows(state.losses, constant_loss=self.constant_loss):
            logger.warning(
                "the training loss grows: from %.3f to %.3f in %d epochs. Try a tenth of the --lr",
                state.losses[0].mean,
                state.losses[-1].mean,
                state.epoch,
            )
        elif looked_at and does_not_move(state.losses, constant_loss=self.constant_loss):
            logger.warning(
                "the training loss does not move: %.3f after %d epochs, and answering without looking gets %.3f. "
                "Try ten times the --lr, pretrained --weights, more --epochs or a finer --mpp, and see with "
                "`wholeslide inspect --overlay` what the network is shown",
                state.losses[-1].mean,
                state.epoch,
                self.constant_loss,
            )


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the training slides in an epoch, (count,) int."""
    return Draws(seed, epoch, "").rng("order").permutation(count)


def _by_stage(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"stage{stage}_{name}": value for stage, value in enumerate(values, start=1)}
