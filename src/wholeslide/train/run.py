"""A run directory: what a training run is told, what it holds, what it leaves behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from wholeslide import __version__
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.cohort.splits import write_split
from wholeslide.errors import RunError
from wholeslide.model.staged import StagedNetwork
from wholeslide.slides.config import SlideConfig
from wholeslide.slides.lock import LOCK_NAME
from wholeslide.streaming.plan import Plan
from wholeslide.train.checkpoint import (
    FORMAT_VERSION,
    Checkpoints,
    Pointer,
    Which,
    check_format,
    disk_errors,
    load_network_tensors,
    write_atomically,
)
from wholeslide.train.config import TrainConfig
from wholeslide.train.learner import Learner, Source
from wholeslide.train.methods import Subject, Tissue, method_of

FOLDERS = ("checkpoints", "log", "predictions", "metrics")
_BEGUN = frozenset({*FOLDERS, "cohort.csv", "plan.json", "excluded.csv"})


@dataclass(frozen=True)
class Run:
    """A run directory that exists.

    ``classes`` are in the order of the network's outputs; ``class_weights`` are the factors on their losses, if any;
    ``plan`` is there where a method's memory is planned; of files of features there is a ``feature_width`` and no ``tissue``.
    ``versions`` are of what made the run.
    """

    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    tissue: Tissue | None
    class_weights: tuple[float, ...] | None
    plan: Plan | None
    versions: dict[str, str]
    feature_width: int | None = None

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        cohort: Cohort,
        *,
        tissue: Tissue | None,
        class_weights: Sequence[float] | None,
        plan: Plan | None,
        feature_width: int | None = None,
    ) -> Run:
        """Make the directory and everything in it but ``config.yaml``, which :meth:`seal` writes last.

        Raises:
            RunError: the disk is full.
        """
        run = cls(
            path=config.out,
            config=config,
            classes=cohort.classes,
            tissue=tissue,
            class_weights=None if class_weights is None else tuple(class_weights),
            plan=plan,
            versions=current_versions(),
            feature_width=feature_width,
        )
        with disk_errors(run.path):
            for name in FOLDERS:
                (run.path / name).mkdir(parents=True, exist_ok=True)
            write_split(cohort, run.path / "cohort.csv")
        return run if plan is None else run.with_plan(plan)

    def with_plan(self, plan: Plan) -> Run:
        """The same run with a plan, which is written.

        Raises:
            RunError: the disk is full.
        """
        with disk_errors(self.path):
            write_atomically(self.path / "plan.json", json.dumps(plan.to_dict(), indent=2).encode())
        return replace(self, plan=plan)

    def seal(self) -> None:
        """Write ``config.yaml``: from here on the directory is a run that can be resumed."""
        content = {
            "format_version": FORMAT_VERSION,
            **self.config.to_dict(),
            "classes": list(self.classes),
            "class_weighting": None if self.class_weights is None else list(self.class_weights),
            "tissue": None if self.tissue is None else self.tissue.to_dict(),
            "feature_width": self.feature_width,
            "versions": self.versions,
        }
        with disk_errors(self.path):
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
            write_atomically(self.path / "config.yaml", text.encode())

    @classmethod
    def open(cls, path: Path) -> Run:
        """A run that was made before.

        Raises:
            RunError: there is none, it is damaged, or it has a format that this version does not know.
        """
        config_path = path / "config.yaml"
        if not config_path.is_file():
            raise RunError.single(
                "not a run directory, it has no config.yaml",
                where=str(path),
                remedy="give the folder that `wholeslide train --out` made",
            )
        try:
            values = yaml.safe_load(config_path.read_text(encoding="utf-8"))
            check_format(values["format_version"], config_path)
            config, tissue, weights = TrainConfig.from_dict(values), values["tissue"], values["class_weighting"]
            return cls(
                path=path,
                config=config,
                classes=tuple(values["classes"]),
                tissue=None if tissue is None else Tissue.from_dict(tissue),
                class_weights=None if weights is None else tuple(weights),
                plan=_read_plan(path / "plan.json") if method_of(config).plans else None,
                versions=values["versions"],
                feature_width=values.get("feature_width"),
            )
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise RunError.single(
                "config.yaml is damaged", where=str(config_path), remedy="put back a copy of it, or train again"
            ) from error

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints")

    @property
    def slide_config(self) -> SlideConfig:
        """How this run's slides are read."""
        return self.config.slide_config()

    @property
    def subject(self) -> Subject:
        """What this run's network is built for."""
        return Subject(len(self.classes), self.class_weights, self.tissue, self.feature_width)

    def cohort(self, slides: Path | None = None, *, keep_missing: bool = False) -> Cohort:
        """The cohort that the run was trained on, its files found below ``slides`` (default: where they were).

        Raises:
            CohortError: files are no longer there; with ``keep_missing``, all of them.
        """
        return read_cohort(self.path / "cohort.csv", slides or self.config.slides, keep_missing=keep_missing)

    def build_network(self, *, pretrained: bool) -> StagedNetwork:
        """The network as it is before training; only its structure where not ``pretrained``."""
        return method_of(self.config).network(self.config, self.subject, pretrained=pretrained)

    def learner(self, network: StagedNetwork, device: torch.device) -> Learner[Any]:
        """What trains the network and predicts with it, in the memory that was planned."""
        return method_of(self.config).learner(self.config, network, self.plan, device)

    def source(self, network: StagedNetwork) -> Source[Any]:
        """How the run's own slides are opened for it; what is made of patches is kept, where the cache is or in the run."""
        shared = self.config.features_cache
        kept = (
            shared if shared is not None and shared.is_dir() else self.path / "features"
        )  # on another machine, it is not
        return method_of(self.config).source(self.config, self.subject, network, self.slide_config, kept)

    def source_of_others(self, network: StagedNetwork, slides: SlideConfig) -> Source[Any]:
        """How other slides are opened, read as ``slides`` says; nothing of them is kept."""
        return method_of(self.config).source(self.config, self.subject, network, slides, None)

    def load_network(self, which: Which = "best") -> StagedNetwork:
        """The trained network, of the best epoch or the last state, on the CPU in evaluation mode.

        Raises:
            RunError: there is no such checkpoint, or it is damaged.
        """
        return self.load_checkpoint(which)[0]

    def load_checkpoint(self, which: Which = "best") -> tuple[StagedNetwork, Pointer]:
        """As `load_network`, and what the checkpoint is: a training that goes on may replace it at any time.

        Raises:
            RunError: there is no such checkpoint, or it is damaged.
        """
        network = self.build_network(pretrained=False)
        weights, _, pointer = self.checkpoints.read(which)
        load_network_tensors(network, weights, where=str(self.checkpoints.folder / pointer.file))
        return network.eval(), pointer


def current_versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return {
        "wholeslide": __version__,
        "torch": str(torch.__version__),
        "timm": version("timm"),
        "python": platform.python_version(),
    }


def claim_folder(out: Path, *, resume: bool) -> Literal["new", "resume"]:
    """Whether a run can begin in a folder, or goes on in it.

    With ``resume``, a folder that is not there, or in which a start was cut off before its first checkpoint, begins
    anew, so that a job which is always started with ``--resume`` works the first time too.

    Raises:
        RunError: something else is in the way.
    """
    if out.exists() and not out.is_dir():
        raise RunError.single("a file is in the way", where=str(out), remedy="give another --out")
    held = {entry.name for entry in out.iterdir()} - {LOCK_NAME} if out.is_dir() else set()
    if not held:
        return "new"
    if resume and "config.yaml" in held:
        return "resume"
    unfinished = all(name in _BEGUN or name.endswith(".part") for name in held)
    if resume and unfinished:
        return "new"
    if resume:
        raise RunError.single(
            "not a run directory, it has no config.yaml", where=str(out), remedy="give the run's own --out"
        )
    raise RunError.single(
        "the run directory exists", where=str(out), remedy="add --resume to go on with it, or give another --out"
    )


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_dict(json.loads(path.read_bytes()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RunError.single(
            "plan.json is missing or damaged", where=str(path), remedy="put back a copy of it, or train again"
        ) from error
