"""What makes no sense in the options of a training run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from wholeslide.baselines.registry import method_info
from wholeslide.cohort.config import check_fractions
from wholeslide.errors import ConfigError, Problem, WholeslideError, option, too_small
from wholeslide.train.config import TrainConfig

_LEAST = {
    "epochs": 1,
    "accumulate": 1,
    "lr_patience": 1,
    "patience": 0,
    "checkpoint_minutes": 0,
    "weight_decay": 0,
    "prefetch_bytes": 0,
    "fold": 0,
    "valid_fold": 0,
}


def config_problems(config: TrainConfig) -> list[Problem]:
    """All of them, each once."""
    problems = [
        *_method_problems(config),
        *_device_problems(config),
        *_range_problems(config),
        *_part_problems(config),
    ]
    return list(dict.fromkeys(problems))  # an unknown method is met by more than one check


def _method_problems(config: TrainConfig) -> list[Problem]:
    try:
        method_info(config.method)
    except ConfigError as error:
        return list(error.problems)
    return []


def _device_problems(config: TrainConfig) -> list[Problem]:
    several = [("--devices", config.devices), ("--nodes", config.nodes)]
    return [
        Problem(f"training on {count} is not supported", name, f"leave {name} at 1")
        for name, count in several
        if count != 1
    ]


def _range_problems(config: TrainConfig) -> list[Problem]:
    problems = too_small(config, _LEAST)
    if config.fold is not None and config.splits_csv is not None:
        problems.append(Problem("two splits are asked for", "--fold and --splits-csv", "give one of the two"))
    if config.valid_fold is not None and config.valid_fold == config.fold:
        problems.append(Problem("it is tested", f"--valid-fold {config.valid_fold}", "give another than --fold"))
    if config.valid_fold is not None and config.fold is None:
        problems.append(Problem("no fold is tested", "--valid-fold", "give --fold, too"))
    for name in ("lr", "head_lr"):
        rate = getattr(config, name)
        if rate is not None and not rate > 0:
            problems.append(
                Problem(f"{rate} is no learning rate", option(name), "give a positive number, such as 1e-5")
            )
    return problems


def _part_problems(config: TrainConfig) -> list[Problem]:
    """What the rooms below have to say about their own options."""
    problems: list[Problem] = []
    checks: list[Callable[[], object]] = [
        config.slide_config,
        config.streaming_config,
        config.augmentation_config,
        config.model_config,
        *([config.encoder_config] if _sees_patches(config.method) else []),
        partial(check_fractions, config.fractions),
    ]
    for check in checks:
        try:
            check()
        except WholeslideError as error:
            problems.extend(error.problems)
    return problems


def _sees_patches(method: str) -> bool:
    """Whether a method sees patches, or their features, in place of the whole slide; an unknown one does not."""
    try:
        return method_info(method).kind != "stages"
    except ConfigError:
        return False
