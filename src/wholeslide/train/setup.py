"""What happens before the first step: the cohort, its audit, its statistics, the network, the plan."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from wholeslide.baselines.feature_files import read_bag
from wholeslide.baselines.registry import method_info
from wholeslide.cohort.audit import audit, leave_out_unreadable
from wholeslide.cohort.files import is_feature_file
from wholeslide.cohort.manifest import Cohort, read_cohort
from wholeslide.cohort.splits import split_by_fold, split_cohort
from wholeslide.errors import CohortError, ConfigError, Problem, SlideError, WholeslideError, option
from wholeslide.model.network import LocalNetwork
from wholeslide.model.staged import StagedNetwork
from wholeslide.slides.statistics import tissue_statistics
from wholeslide.slides.working import WorkingSlide
from wholeslide.streaming.disk_store import folder_for_features
from wholeslide.streaming.plan import Plan
from wholeslide.streaming.planner import parse_memory
from wholeslide.train.config import GIB, TrainConfig
from wholeslide.train.fitting import Candidate, Largest, choose_stages, plan_that_fits
from wholeslide.train.history import check_loggers
from wholeslide.train.methods import Subject, Tissue, method_of
from wholeslide.train.run import Run, claim_folder
from wholeslide.train.survey import BagFacts, Finding, SlideFacts, facts_of, oddities, raise_finding, survey
from wholeslide.train.validation import balanced_weights
from wholeslide.train.views import Entry, entries, open_slide_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATISTICS_PIXELS = 4_000_000
_PLACEHOLDER = (0.5, 0.5, 0.5)
GO_ON = "--on-unreadable exclude goes on without it"

MAY_CHANGE = frozenset(
    {
        "manifest",
        "slides",
        "out",
        "splits_csv",
        "features_cache",
        "on_unreadable",
        "accelerator",
        "prefetch_bytes",
        "patience",
    }
    | {
        "loggers",
        "checkpoint_minutes",
        "resume",
        "quiet",
        "memory",
        "store",
        "store_dir",
        "tile",
        "weights",
        "decoders",
    }
)
"""Options that a resumed run may be given anew. Those that the plan was made from have no effect: the plan stays."""


@dataclass(frozen=True)
class Prepared:
    """A run about to begin. ``facts`` of slides and ``bags`` of features are by file, ``excluded`` has columns ``file, error``.

    ``tissue`` and ``plan`` are there where there are slides, and where the method's memory is planned; ``candidates`` are what
    ``--stages auto`` chose from.
    """

    config: TrainConfig
    cohort: Cohort
    excluded: pd.DataFrame
    facts: dict[str, SlideFacts]
    bags: dict[str, BagFacts]
    tissue: Tissue | None
    class_weights: list[float] | None
    network: StagedNetwork
    plan: Plan | None
    device: torch.device
    candidates: tuple[Candidate, ...] = ()

    @property
    def feature_width(self) -> int | None:
        """Of files of features, if those are trained on."""
        return next((bag.width for bag in self.bags.values()), None)

    def facts_of_split(self, name: str) -> list[SlideFacts]:
        return [self.facts[str(file)] for file in self.cohort.split(name)["file"]]


def prepare_run(config: TrainConfig) -> Prepared:
    """Read, check and measure everything that a new run needs. Writes nothing.

    Raises:
        WholeslideError: all that stands in the way: first the options, the folder, the manifest and the network
            together; then every slide that cannot be read and every fault of the cohort.
    """
    read, network = _quick_checks(config)
    findings = survey(entries(read.table), config.slide_config(), cache=config.cache, quiet=config.quiet)
    cohort, excluded = _readable(config, read, findings)
    for warning in audit(cohort, group=config.group, open_check=partial(_refuse, findings), unit=config.unit):
        logger.warning("%s", warning)
    (facts, bags), device = _facts_by_file(findings, entries(cohort.table)), choose_device(config)
    candidates: tuple[Candidate, ...] = ()
    if config.chooses_stages:
        config, candidates = choose_stages(config, _largest(facts), device)
    if len(excluded) or candidates:
        network = _network(config, cohort)
    tissue = _measure_tissue(config, cohort) if facts else None
    if tissue is not None:
        network.normalise_by(tissue.pixel_mean, tissue.pixel_std)
    for oddity in oddities(facts):
        logger.warning("%s", oddity)
    if cohort.split("test").empty:
        logger.warning("no slide is in the test split: `wholeslide evaluate` will have nothing to score")
    plan = _plan(config, network, facts, device)
    return Prepared(
        config=method_of(config).settled(config, network),
        cohort=cohort,
        excluded=excluded,
        facts=facts,
        bags=bags,
        tissue=tissue,
        class_weights=_class_weights(config, cohort),
        network=network,
        plan=plan,
        device=device,
        candidates=candidates,
    )


def _largest(facts: Mapping[str, SlideFacts]) -> Largest:
    return max((Largest(file, fact.size) for file, fact in facts.items()), key=lambda slide: slide.size.area)


def _plan(
    config: TrainConfig, network: StagedNetwork, facts: Mapping[str, SlideFacts], device: torch.device
) -> Plan | None:
    """The plan of the run's memory, where its method has one; a folder for what it keeps on disk is tried."""
    if not isinstance(network, LocalNetwork):
        return None
    plan = plan_that_fits(config, network.to(device), _largest(facts), device)
    if plan.store == "disk":
        folder_for_features(config.store_dir)
    return plan


def choose_device(config: TrainConfig) -> torch.device:
    """The device to train on; with ``auto`` a CUDA device if there is one.

    Raises:
        ConfigError: a CUDA device is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if config.accelerator == "cuda" and not available:
        raise ConfigError.single("no CUDA device is found", where="--accelerator cuda", remedy="choose cpu or auto")
    return torch.device("cuda", 0) if available and config.accelerator != "cpu" else torch.device("cpu")


def prefetch_limit(config: TrainConfig, device: torch.device) -> int:
    """Most bytes of a view that is read ahead."""
    if config.prefetch_bytes is not None:
        return config.prefetch_bytes
    return 0 if config.memory is not None and device.type == "cpu" else GIB


def resumed_config(stored: TrainConfig, given: TrainConfig) -> TrainConfig:
    """The options of a run that goes on: the given ones, if they do not change what the run computes.

    ``epochs`` may grow, but not where the decay of the rates or the turn to the next stage depends on it.

    Raises:
        ConfigError: every option that differs and must not.
    """
    may_change = set(MAY_CHANGE)
    stored, given = stored.resolved(), given.resolved()
    if given.precision == "auto":  # it is measured already
        given = replace(given, precision=stored.precision)
    if given.chooses_stages:  # they are chosen already
        given = replace(given, stages=stored.stages)
    if stored.cache is not None and given.cache is not None:  # moved; prepared pixels are not quite the original ones
        may_change.add("cache")
    if stored.mask_dir is not None and given.mask_dir is not None:  # moved; without its masks a slide is another one
        may_change.add("mask_dir")
    if stored.recipe().lr_schedule not in ("multistep", "cosine") and not stored.in_turn:
        may_change.add("epochs")
    problems = []
    for field in fields(TrainConfig):
        before, now = getattr(stored, field.name), getattr(given, field.name)
        if field.name not in may_change and before != now:
            problems.append(
                Problem(
                    f"{now} is asked for, but the run began with {before}",
                    option(field.name),
                    "resume with the options that the run began with, or begin another in a new --out",
                )
            )
    if problems:
        raise ConfigError(problems)
    kept = {name: getattr(stored, name) for name in ("memory", "store", "tile", "weights", "manifest", "splits_csv")}
    return replace(given, **kept)


def open_resumed(config: TrainConfig) -> tuple[Run, Cohort]:
    """The run in ``config.out`` and its cohort, with the options that it goes on with.

    Raises:
        WholeslideError: the run is damaged, its slides are gone, or the options are others.
    """
    stored = Run.open(config.out)
    run = replace(stored, config=resumed_config(stored.config, config))
    return run, run.cohort()


def _quick_checks(config: TrainConfig) -> tuple[Cohort, StagedNetwork]:
    """What can be found wrong within seconds, together. The cohort is as it was read, before a split is drawn."""
    problems: list[Problem] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except WholeslideError as error:
            problems.extend(error.problems)
            return None

    attempt(config.check)
    attempt(partial(check_loggers, config.loggers))
    attempt(partial(choose_device, config))
    attempt(partial(_check_memory, config.memory))
    attempt(partial(_check_store_dir, config.store_dir))
    attempt(partial(claim_folder, config.out, resume=config.resume))
    cohort = attempt(partial(_read_cohort, config))
    divided = None if cohort is None else attempt(partial(_divided, config, cohort))
    known = attempt(partial(method_info, config.method)) is not None
    network = attempt(partial(_network, config if known else replace(config, method="local"), divided))
    if problems:
        raise WholeslideError(dict.fromkeys(problems))  # some are found by more than one check
    assert cohort is not None
    assert network is not None
    return cohort, network


def _check_memory(memory: str | None) -> None:
    if memory not in (None, "smallest"):
        parse_memory(memory)


def _check_store_dir(folder: Path | None) -> None:
    if folder is not None:
        folder_for_features(folder)


def _read_cohort(config: TrainConfig) -> Cohort:
    """The manifest, with its own split or that of ``--fold``, if there is one."""
    keep_missing = config.on_unreadable == "exclude"  # left out with what cannot be read
    cohort = read_cohort(config.manifest, config.slides, splits_csv=config.splits_csv, keep_missing=keep_missing)
    if config.fold is not None:
        return split_by_fold(cohort, config.fold, config.valid_fold)
    if "fold" in cohort.table and not cohort.has_splits:
        raise CohortError.single(
            "there are folds, but no fold to test on is chosen",
            where=f"column 'fold' of {config.manifest.name}",
            remedy="give --fold with its number, or remove the column to have a split drawn",
        )
    return cohort


def _divided(config: TrainConfig, cohort: Cohort) -> Cohort:
    """The cohort with a split, drawn if it has none."""
    if cohort.has_splits:
        return cohort
    return split_cohort(cohort, fractions=config.fractions, group=config.group, seed=config.seed)


def _readable(config: TrainConfig, cohort: Cohort, findings: Mapping[Path, Finding]) -> tuple[Cohort, pd.DataFrame]:
    """The cohort that is trained on, with its split, and what is left out of it (columns ``file, error``)."""
    excluded = pd.DataFrame(columns=["file", "error"], dtype=object)
    if config.on_unreadable == "exclude":
        cohort, excluded = leave_out_unreadable(cohort, partial(raise_finding, findings))
    for file, error in excluded.itertuples(index=False):
        logger.warning("%s is left out: %s", file, error)
    return _divided(config, cohort), excluded


def _refuse(findings: Mapping[Path, Finding], path: Path) -> None:
    """The audit's check of one slide; it tells that there is another way.

    Raises:
        SlideError: what the survey met.
    """
    try:
        raise_finding(findings, path)
    except WholeslideError as error:
        problems = [replace(problem, remedy=f"{problem.remedy}; {GO_ON}") for problem in error.problems]
        raise SlideError(problems) from error


def _network(config: TrainConfig, cohort: Cohort | None) -> StagedNetwork:
    subject = Subject(
        classes=2 if cohort is None else max(2, len(cohort.classes)),
        class_weights=None if cohort is None else _class_weights(config, cohort),
        tissue=Tissue(_PLACEHOLDER, _PLACEHOLDER, 0.5),
        feature_width=None if cohort is None else _feature_width(config, cohort),
    )
    return method_of(config).network(config, subject, pretrained=True)


def _feature_width(config: TrainConfig, cohort: Cohort) -> int | None:
    """How wide the features are where the cohort's files hold features in place of slides.

    Raises:
        CohortError: only some do, or the method needs slides.
    """
    paths = [entry.path for entry in entries(cohort.table)]
    files = [path for path in paths if is_feature_file(path)]
    if not files:
        return None
    if method_info(config.method).kind != "bags":
        what, remedy = (
            "files of features, where the method needs slides",
            "give the slides' folder, or a method of features",
        )
        raise CohortError.single(what, where=f"--slides {config.slides}, --method {config.method}", remedy=remedy)
    if len(files) < len(paths):
        what = f"{len(files)} files of features among {len(paths)} slides"
        raise CohortError.single(what, where=f"--slides {config.slides}", remedy="give slides only, or features only")
    for path in files:
        try:
            return read_bag(path).width
        except WholeslideError:  # the survey reports it with all others
            continue
    return 1


def _class_weights(config: TrainConfig, cohort: Cohort) -> list[float] | None:
    if config.class_weights == "none":
        return None
    counts = training_counts(cohort)
    # A class without training slides is a fault that the audit reports.
    return balanced_weights([max(1, count) for count in counts])


def training_counts(cohort: Cohort) -> list[int]:
    """Number of training files of each class."""
    labels = cohort.split("train")["label"]
    return [int((labels == name).sum()) for name in cohort.classes]


def _measure_tissue(config: TrainConfig, cohort: Cohort) -> Tissue:
    """Statistics of the training split's tissue, and of no other slide."""

    def slides() -> Iterator[WorkingSlide]:
        for entry in entries(cohort.split("train")):
            with closing(open_slide_of(entry, config.slide_config(), config.cache)) as slide:
                yield slide

    found = tissue_statistics(slides(), seed=config.seed, max_pixels=STATISTICS_PIXELS)
    mean, deviation = found.mean, found.std
    return Tissue(
        pixel_mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        pixel_std=(float(deviation[0]), float(deviation[1]), float(deviation[2])),
        mean_grey=float(found.mean_grey),
    )


def _facts_by_file(
    findings: Mapping[Path, Finding], rows: list[Entry]
) -> tuple[dict[str, SlideFacts], dict[str, BagFacts]]:
    """What was found of slides, and of files of features, which are alike.

    Raises:
        CohortError: features of several widths.
    """
    found = dict(zip([entry.file for entry in rows], facts_of(findings, rows), strict=True))
    bags = {file: fact for file, fact in found.items() if isinstance(fact, BagFacts)}
    widths = Counter(bag.width for bag in bags.values())
    usual = widths.most_common(1)[0][0] if widths else 0
    problems = [
        Problem(f"{bag.width} features a patch, where most have {usual}", file, "give features that one network made")
        for file, bag in bags.items()
        if bag.width != usual
    ]
    if problems:
        raise CohortError(problems)
    return {file: fact for file, fact in found.items() if isinstance(fact, SlideFacts)}, bags
