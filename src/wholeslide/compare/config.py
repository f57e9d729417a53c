"""What a comparison can be told. Free of torch, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from wholeslide.errors import ConfigError, Problem, WholeslideError, option, too_small
from wholeslide.train.config import TrainConfig

FOLDS = 5
"""Drawn where nothing else is said."""
ALL = "all"
"""In ``grid``, stands for every method that is not named there."""

OWN = frozenset({"method", "fold", "valid_fold", "fractions", "splits_csv", "resume"})
"""Options of ``train`` that a comparison sets itself, and does not take."""
ALIKE = OWN | {"manifest", "slides", "out", "seed", "unit", "group", "monitor", "on_unreadable", "quiet"}
"""Options that are the same for every method: neither ``overrides`` nor ``grid`` may set them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_SHARE = re.compile(r"([1-9]\d*)/([1-9]\d*)")
_OPTIONS = tuple(found.name for found in dataclasses.fields(TrainConfig))

Point = dict[str, Any]
"""Options of ``train`` by name, as ``{"lr": 1e-4}``."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, and how.

    Args:
        methods: The methods of train --method, separated by commas; NAME=METHOD names one that is compared with other options,
            as plain=local-k4 with overrides of its own.
        reference: The method that the others are tested against; left out: the first.
        folds: Number of folds, drawn as by `wholeslide split --folds`; left out: those of the manifest's column fold, or 5.
        repeats: How often folds are drawn, each time by the next seed; every method is trained on all of them.
        seeds: How often each method is trained on each fold; probabilities are averaged over the trainings.
        nested: Let each of the other folds validate in turn: a setting is chosen by its mean over them, and its networks'
            probabilities are averaged. Left out: the next fold validates.
        resamples: Bootstrap resamples of the patients, for intervals and tests.
        cells: Which trainings this process takes care of: I/N for the I-th of N shares, slurm for the share of a task of a
            SLURM array. Left out: all that no other process has in work.
        overrides: For each method, options that it alone gets. For --config: overrides, then METHOD, then OPTION and VALUE.
        grid: For each method (or all), a list of settings to try, of which validation chooses one on each fold; as many for
            each method.
    """

    methods: tuple[str, ...]
    reference: str | None = None
    folds: int | None = None
    repeats: int = 1
    seeds: int = 1
    nested: bool = False
    resamples: int = 10_000
    cells: str | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    train: TrainConfig

    @property
    def out(self) -> Path:
        """The folder of the comparison."""
        return self.train.out.expanduser().absolute()

    @property
    def names(self) -> list[str]:
        """What the methods are called here."""
        return [entry.partition("=")[0] for entry in self.methods]

    def method_of(self, name: str) -> str:
        """What ``train --method`` calls it."""
        entries = (entry.partition("=") for entry in self.methods)
        return next((method for known, _, method in entries if known == name and method), name)

    def points(self, method: str) -> Sequence[Point]:
        """The settings of a method that are tried, one at least."""
        return self.grid.get(method) or self.grid.get(ALL) or [{}]

    def train_config(self, method: str, point: Point | None = None) -> TrainConfig:
        """How a method is trained, but for fold, seed and folder.

        Raises:
            ConfigError: there is no such method.
        """
        options = {**self.overrides.get(method, {}), **(self.points(method)[0] if point is None else point)}
        return replace(self.train, method=self.method_of(method), **options).with_absolute_paths().resolved()

    def check(self) -> None:
        """Find every option that makes no sense.

        Raises:
            ConfigError: all of them together.
        """
        problems = [
            *too_small(self, {"folds": 3, "repeats": 1, "seeds": 1, "resamples": 100}),
            *_method_problems(self),
            *_point_problems(self),
            *_own_problems(self.train),
        ]
        checks: list[Callable[[], object]] = [partial(share_of, self.cells)]
        if not problems:
            checks.append(partial(_check_trainings, self))
        for check in checks:
            try:
                check()
            except WholeslideError as error:
                problems += error.problems
        if problems:
            raise ConfigError(dict.fromkeys(problems))


def share_of(cells: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Which share, counted from 0, of how many; ``(0, 1)`` is everything.

    Args:
        cells: ``I/N`` with I from 1, ``slurm``, or nothing.
        environment: where ``slurm`` finds SLURM_ARRAY_TASK_ID, _MIN, _STEP and _COUNT. Ids that have gaps share all the same, by
            their remainder.

    Raises:
        ConfigError: it is no share, or this is no task of an array.
    """
    if cells is None:
        return 0, 1
    if cells == "slurm":
        return _slurm_share(environment)
    match = _SHARE.fullmatch(cells)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError.single(
            "not a share", where=f"--cells {cells}", remedy="give I/N with I from 1 to N, or slurm"
        )
    return int(match[1]) - 1, int(match[2])


def _slurm_share(environment: Mapping[str, str]) -> tuple[int, int]:
    try:
        task, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "COUNT"))
        first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", at)) for name, at in (("MIN", 0), ("STEP", 1)))
    except (KeyError, ValueError):
        raise ConfigError.single(
            "this is no task of a SLURM array",
            where="--cells slurm",
            remedy="submit it with `sbatch --array=0-9`, or give I/N",
        ) from None
    return (task - first) // step % count, count


def _method_problems(config: CompareConfig) -> Iterator[Problem]:
    if not config.methods or "" in config.methods:
        yield Problem("no method", "--methods", "give some, separated by commas, as abmil,local-k4")
    twice = sorted({name for name in config.names if config.names.count(name) > 1})
    for name in twice:
        yield Problem(f"{name} is given twice", "--methods", "give each method once")
    odd = [name for name in config.names if name and not _NAME.fullmatch(name)]
    for name in odd:
        yield Problem(f"{name!r} is no name", "--methods", "give letters, digits, dashes, dots and plus signs")
    if config.reference is not None and config.reference not in config.names:
        yield Problem(
            f"{config.reference} is none of the methods", "--reference", f"choose among {', '.join(config.names)}"
        )
    for name, asked in (("overrides", config.overrides), ("grid", config.grid)):
        known = [*config.names, *([ALL] if name == "grid" else [])]
        for method in asked:
            if method not in known:
                yield Problem(f"{method} is none of the methods", option(name), f"choose among {', '.join(known)}")


def _point_problems(config: CompareConfig) -> Iterator[Problem]:
    """What is wrong with the options that methods are given by themselves."""
    counts = {method: len(config.points(method)) for method in config.names}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{method} {count}" for method, count in counts.items())
        yield Problem(f"unequal budgets: {told}", "--grid", "give every method as many settings to try")
    for name, method, point in given_points(config):
        for key in point:
            where = f"{option(name)}, {method}"
            if key not in _OPTIONS:
                yield Problem(f"{key} is no option of train", where, "see wholeslide train --help")
            elif key in ALIKE:
                yield Problem(f"{key} is the same for every method", where, "leave it out")


def given_points(config: CompareConfig) -> Iterator[tuple[str, str, Point]]:
    """What was given for single methods: in which option, for which method, its settings."""
    for method, point in config.overrides.items():
        yield "overrides", method, point
    for method, points in config.grid.items():
        for point in points:
            yield "grid", method, point


def _own_problems(train: TrainConfig) -> Iterator[Problem]:
    default = {found.name: found.default for found in dataclasses.fields(TrainConfig)}
    for name in sorted(OWN):
        if getattr(train, name) != default[name]:
            yield Problem("a comparison chooses this itself", option(name), "leave it out")


def _check_trainings(config: CompareConfig) -> None:
    """Every method with every setting, as `train` checks it.

    Raises:
        ConfigError: all that is wrong.
    """
    problems: list[Problem] = []
    for method in config.names:
        for point in config.points(method):
            try:
                config.train_config(method, point).check()
            except WholeslideError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
