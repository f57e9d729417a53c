"""The optimisers, with two learning rates, and how the rates decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wholeslide.errors import RunError
from wholeslide.model.staged import StagedNetwork
from wholeslide.train.config import TrainConfig

MULTISTEP_FRACTIONS = (25 / 55, 35 / 55, 45 / 55)
DECAY = 0.1
LEAST_OF_COSINE = 0.05


def build_optimizer(network: StagedNetwork, config: TrainConfig, stage: int | None) -> torch.optim.Optimizer:
    """The recipe's optimiser over the trainable parameters of one stage (counted from 1), or of all (None).

    Two groups: the backbone at ``lr``, classifiers and decoders at ``head_lr``.
    """
    recipe, head_lr = config.recipe(stage or 1), config.classifier_lr(stage or 1)
    groups = [
        {"params": network.backbone_parameters(stage), "lr": recipe.lr, "base_lr": recipe.lr},
        {"params": network.head_parameters(stage), "lr": head_lr, "base_lr": head_lr},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "sgd-nesterov":
        momentum = recipe.betas[0]
        return torch.optim.SGD(groups, momentum=momentum, nesterov=True, weight_decay=recipe.weight_decay)
    return LookaheadRAdam(groups, betas=recipe.betas, weight_decay=recipe.weight_decay)


class LookaheadRAdam(torch.optim.RAdam):
    """RAdam, and after every six steps half of the way back (Zhang et al. 2019, algorithm 1, with k = 6 and α = 0.5)."""

    PERIOD, SHARE = 6, 0.5

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of RAdam; the slow weights are kept in the state, and taken up at every sixth."""
        before = {p: p.detach().clone() for p in self._stepped() if "slow" not in self.state[p]}
        loss: float | None = super().step(closure)
        for parameter in self._stepped():
            state = self.state[parameter]
            state.setdefault("slow", before.get(parameter))
            if int(state["step"]) % self.PERIOD == 0:
                parameter.copy_(state["slow"].lerp_(parameter, self.SHARE))
        return loss

    def _stepped(self) -> list[nn.Parameter]:
        return [parameter for parameter in optimizer_parameters(self) if parameter.grad is not None]


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter that the optimiser steps."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as ``<parameter>/<entry>`` tensors, for a file without pickle."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        f"{names[parameter]}/{entry}": value
        for parameter in optimizer_parameters(optimizer)
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], *, where: str
) -> None:
    """The inverse of :func:`optimizer_tensors`, into a fresh optimiser.

    Raises:
        RunError: the tensors belong to another network.
    """
    parameters = dict(network.named_parameters())
    stepped = set(optimizer_parameters(optimizer))
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters.get(name)
        fits = parameter is not None and parameter in stepped and (value.ndim == 0 or value.shape == parameter.shape)
        if parameter is None or not fits:
            raise RunError.single(
                f"the optimiser's state of {name!r} does not belong to this network",
                where=where,
                remedy="resume with the wholeslide and timm that config.yaml names",
            )
        # AdamW keeps its count of steps on the CPU, its moments beside the parameter.
        device = torch.device("cpu") if value.ndim == 0 else parameter.device
        optimizer.state[parameter][entry] = value.to(device)


@dataclass
class RateState:
    """How far the learning rates have decayed."""

    factor: float = 1.0
    waited: int = 0


class RateSchedule:
    """Multiplies both learning rates by 0.1, on a plateau or at fixed epochs, or lowers them along a cosine."""

    def __init__(self, config: TrainConfig, state: RateState, *, stage: int = 1) -> None:
        self.config = config
        self.state = state
        self._epochs, self._decay = config.recipe(stage).epochs, config.recipe(stage).lr_schedule

    @property
    def milestones(self) -> list[int]:
        """Numbers of finished epochs after which the rates decay: 25, 35 and 45 of 55, scaled to ``epochs``."""
        if self._decay != "multistep":
            return []
        return [round(self._epochs * fraction) for fraction in MULTISTEP_FRACTIONS]

    def epoch_end(self, *, epochs_done: int, improved: bool) -> bool:
        """Take note of a finished epoch. True if the rates decayed."""
        if self._decay == "cosine":
            progress = min(1.0, epochs_done / self._epochs)
            self.state.factor = LEAST_OF_COSINE + (1 - LEAST_OF_COSINE) * (1 + math.cos(math.pi * progress)) / 2
            return False
        if self._decay == "plateau":
            self.state.waited = 0 if improved else self.state.waited + 1
            if self.state.waited < self.config.lr_patience:
                return False
            self.state.waited = 0
            self.state.factor *= DECAY
            return True
        decays = self.milestones.count(epochs_done)
        self.state.factor *= DECAY**decays
        return decays > 0

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the optimiser's rates."""
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.state.factor
