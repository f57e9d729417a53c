"""The trainings of a comparison: each method on each fold with each seed, and what their folders tell of them.

``cells/<method>/fold-<fold>/seed-<seed>`` is an ordinary run directory (with ``-point-<n>`` where several settings are tried, and
``-valid-<fold>`` where several folds validate in turn).
Beside it stand ``seed-<seed>.json``, the record; ``.csv``, the predictions of the test fold; ``.log``, what was said.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wholeslide.compare.config import CompareConfig, Point
from wholeslide.compare.protocol import Protocol, folds_name
from wholeslide.errors import Problem, RunError
from wholeslide.train.checkpoint import disk_errors, write_atomically
from wholeslide.train.config import TrainConfig

State = Literal["begun", "finished", "failed"]


@dataclass(frozen=True)
class Cell:
    """One method on one fold with one seed, in the folder ``out`` of the comparison."""

    out: Path
    method: str
    fold: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, fold {self.fold}, seed {self.seed}"

    @property
    def run(self) -> Path:
        """The run directory, and what the files beside it are named after."""
        return self.out / "cells" / self.method / f"fold-{self.fold}" / f"seed-{self.seed}"

    def runs(self, settings: int, validating: Sequence[int]) -> list[list[Path]]:
        """The run directories of each setting that is tried, one for each validating fold."""
        points = [f"-point-{number}" for number in range(settings)] if settings > 1 else [""]
        folds = [f"-valid-{fold}" for fold in validating] if len(validating) > 1 else [""]
        return [[self.run.with_name(f"{self.run.name}{point}{fold}") for fold in folds] for point in points]

    @property
    def record_path(self) -> Path:
        return self.run.with_name(f"{self.run.name}.json")

    @property
    def predictions_path(self) -> Path:
        return self.run.with_name(f"{self.run.name}.csv")

    @property
    def log_path(self) -> Path:
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def record(self) -> Record:
        """What is known of it.

        Raises:
            RunError: the record is damaged.
        """
        return Record.read(self.record_path)


@dataclass(frozen=True)
class Record:
    """How far a cell is, and what it took.

    Attributes:
        state: ``finished`` where its test fold is predicted; ``failed`` for the reasons in ``problems``.
        train_seconds: wall time of training, all settings and all resumes together.
        cpu_seconds: time of all cores of the process for it, which other work on the machine hardly changes.
        test_seconds: wall time of predicting the test fold.
        peak_bytes: the most resident memory while training, with that of its processes.
        peak_device_bytes: the most memory reserved on a GPU; nothing without one.
        trained_parameters: of the network that was chosen.
        chosen: number of the setting that validation chose.
        validation: of each setting the selection metric and the loss on the validating folds, their mean, where there are several.
        versions: of the software.
        machine: what it was trained on.
        problems: what, where, remedy.
    """

    state: State = "begun"
    train_seconds: float = 0.0
    cpu_seconds: float = 0.0
    test_seconds: float = 0.0
    peak_bytes: int = 0
    peak_device_bytes: int | None = None
    trained_parameters: int | None = None
    chosen: int = 0
    validation: list[dict[str, float | None]] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[list[str]] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Record:
        """That of a file; that of a cell which is not begun where there is none.

        Raises:
            RunError: the file is damaged.
        """
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            remedy = "remove it to have the test fold predicted once more"
            raise RunError.single("the record is damaged", where=str(path), remedy=remedy) from error

    def write(self, path: Path) -> None:
        """Replace the file.

        Raises:
            RunError: the disk is full.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2).encode())

    def failed(self, problems: Sequence[Problem]) -> Record:
        """The same, ended for these reasons."""
        return replace(self, state="failed", problems=[[p.what, p.where, p.remedy] for p in problems])

    @property
    def reasons(self) -> list[Problem]:
        """Why it failed."""
        return [Problem(*told) for told in self.problems]


@dataclass(frozen=True)
class Case:
    """What a cell's process is given: the trainings of each setting, one a validating fold, and what decides between them."""

    cell: Cell
    trainings: tuple[tuple[TrainConfig, ...], ...]
    classes: tuple[str, ...]

    def to_json(self) -> str:
        cell = {**dataclasses.asdict(self.cell), "out": str(self.cell.out)}
        trainings = [[training.to_dict() for training in setting] for setting in self.trainings]
        return json.dumps({"cell": cell, "trainings": trainings, "classes": self.classes})

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        cell = Cell(**{**values["cell"], "out": Path(values["cell"]["out"])})
        trainings = (
            tuple(replace(TrainConfig.from_dict(found), resume=True) for found in setting)
            for setting in values["trainings"]
        )
        return cls(cell, tuple(trainings), tuple(values["classes"]))


def grid(protocol: Protocol, out: Path) -> list[Cell]:
    """All cells: method by method, in each fold by fold."""
    return [
        Cell(out, method, fold, seed)
        for method in protocol.methods
        for fold in protocol.folds
        for seed in protocol.seeds
    ]


def case_of(cell: Cell, config: CompareConfig, protocol: Protocol) -> Case:
    """How a cell is trained: its method's options, on the folds of the comparison, going on where it was left."""
    points, validating = config.points(cell.method), protocol.validating(cell.fold)

    def training(point: Point, fold: int, run: Path) -> TrainConfig:
        return replace(
            config.train_config(cell.method, point),
            manifest=cell.out / folds_name(protocol.draw_of(cell.fold)),
            out=run,
            features_cache=config.train.features_cache or cell.out / "features",
            fold=int(cell.fold),
            valid_fold=fold if len(validating) > 1 else None,
            seed=cell.seed,
            on_unreadable="stop",
            resume=True,
            quiet=True,
        ).with_absolute_paths()

    runs = cell.runs(len(points), validating)
    trainings = (
        tuple(training(point, fold, run) for fold, run in zip(validating, of_point, strict=True))
        for point, of_point in zip(points, runs, strict=True)
    )
    return Case(cell, tuple(trainings), protocol.classes)
