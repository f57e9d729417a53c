"""The protocol: what is compared and by which rules, written down before any test score is computed.

``protocol.json`` is made by the first call and is never changed by a later one, but for amendments: methods that are added,
versions of the software that were not there at first, and a test that the software has mended since, each with its time and with
how much had been scored by then. A call that asks for anything else is refused, and told what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wholeslide.baselines.registry import method_info
from wholeslide.cohort.manifest import read_cohort
from wholeslide.cohort.splits import write_split
from wholeslide.compare.config import ALIKE, CompareConfig, Point
from wholeslide.compare.folds import Folds, check_folds_of, make_folds
from wholeslide.errors import CohortError, Problem, RunError
from wholeslide.train.checkpoint import check_format, disk_errors, file_sha256, write_atomically
from wholeslide.train.config import TrainConfig
from wholeslide.train.run import current_versions

FORMAT_VERSION = 1
NAME = "protocol.json"

DESIGN = (
    "Each fold is tested by a network that the next fold validated (after the last, the first) and the others trained."
)
NESTED = (
    "Each fold is tested by networks that each of the other folds validated in turn and the rest trained; their probabilities are "
    "averaged, and settings are chosen by the mean over the validating folds."
)
CHOICE = "highest (of a loss, lowest), ties by the lower validation loss, then by the earlier"
TEST = (
    "Two-sided paired bootstrap of the difference in AUROC to the reference, the AUROC averaged over folds; patients are drawn "
    "within fold and class, k − 1 of k, each counting k / (k − 1), the same for both methods."
)
WITHOUT_EFFECT = (ALIKE - {"unit", "group", "monitor", "on_unreadable"}) | {
    "features_cache", "loggers", "checkpoint_minutes", "prefetch_bytes", "memory", "store", "store_dir", "tile", "decoders",
    "accelerator", "devices", "nodes",
}  # fmt: skip
"""Options of ``train`` that may differ between calls: where files are, how much memory is taken, what is logged."""
_PATHS = ("cache", "mask_dir")
_FOLDS = re.compile(r"folds(-\d+)?\.csv")


@dataclass(frozen=True)
class Protocol:
    """What ``protocol.json`` holds.

    ``facts`` must be the same in every call; ``methods`` are, by name, their options and settings; ``amendments`` say what was
    added after ``frozen``, a time in UTC.
    """

    facts: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    versions: dict[str, str]
    frozen: str
    amendments: tuple[dict[str, Any], ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.facts["cohort"]["classes"])

    @property
    def unit(self) -> str:
        return str(self.facts["cohort"]["unit"])

    @property
    def reference(self) -> str:
        return str(self.facts["reference"])

    @property
    def seeds(self) -> list[int]:
        return list(self.facts["seeds"])

    @property
    def folds(self) -> list[str]:
        return [str(part["fold"]) for part in self.facts["folds"]["parts"]]

    @property
    def draws(self) -> int:
        """How often folds were drawn."""
        return max(map(self.draw_of, self.folds))

    def draw_of(self, fold: str) -> int:
        """In which draw a fold is, from 1."""
        return int(next(part.get("draw", 1) for part in self.facts["folds"]["parts"] if str(part["fold"]) == fold))

    def validating(self, fold: str) -> list[int]:
        """The folds that validate where one is tested, one after another."""
        names = [name for name in self.folds if self.draw_of(name) == self.draw_of(fold)]
        at, count = names.index(fold), len(names)
        later = [int(names[(at + step) % count]) for step in range(1, count)]
        return later if self.facts["design"] == NESTED else later[:1]

    def to_json(self) -> bytes:
        """As it is written."""
        values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Protocol:
        """The protocol of a comparison.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = folder / NAME
        try:
            values = json.loads(path.read_bytes())
            check_format(values.pop("format_version"), path)
            return cls(**{**values, "amendments": tuple(values["amendments"])})
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise RunError.single(
                "the protocol is missing or damaged",
                where=str(path),
                remedy="put back a copy of it, or give another --out",
            ) from error


def freeze(config: CompareConfig) -> tuple[Protocol, Folds]:
    """The protocol of a comparison and its folds: written now, or by an earlier call that asked for the same.

    Call it alone in the folder (`slides.lock`).

    Raises:
        CohortError: the manifest or its folds cannot be compared on.
        RunError: the folder holds another comparison, or something else; it cannot be written.
    """
    if (config.out / NAME).exists():
        return _gone_on(config)
    _check_empty(config.out)
    folds = make_folds(config)
    protocol = Protocol(
        facts=_facts(config, folds, config.reference or config.names[0]),
        methods=_methods(config),
        versions=current_versions(),
        frozen=_now(),
    )
    for number, cohort in enumerate(folds.draws, start=1):
        write_split(cohort, config.out / folds_name(number))
    _write(protocol, config.out)
    return protocol, folds


def folds_name(draw: int) -> str:
    """The file of a draw of folds, from 1."""
    return "folds.csv" if draw == 1 else f"folds-{draw}.csv"


def protocol_hash(folder: Path) -> str:
    """SHA-256 of the protocol's file, in hexadecimal."""
    return file_sha256(folder / NAME)


def _gone_on(config: CompareConfig) -> tuple[Protocol, Folds]:
    protocol = Protocol.read(config.out)
    problems = list(_differences({"manifest": protocol.facts["manifest"]}, {"manifest": _manifest(config)}, config.out))
    if problems:
        raise RunError(problems)
    folds = _read_folds(config, protocol)
    facts = _facts(config, folds, config.reference or protocol.reference)
    facts["primary"]["test"] = protocol.facts["primary"]["test"]  # another is an amendment
    methods = _methods(config)
    if config.repeats != protocol.draws:
        what = f"folds were drawn {protocol.draws} times, and are now asked for {config.repeats} times"
        problems.append(Problem(what, str(config.out / NAME), "call it as it was begun, or give another --out"))
    problems += _differences(protocol.facts, facts, config.out)
    problems += _differences(
        {name: protocol.methods[name] for name in protocol.methods if name in methods}, methods, config.out
    )
    left = [name for name in protocol.methods if name not in methods]
    if left:
        remedy = "name all that were begun, so that none is left out for its scores; or give another --out"
        problems.append(Problem(f"{', '.join(left)} is compared here, too", f"--methods, {config.out / NAME}", remedy))
    if problems:
        raise RunError(problems)
    return _amended(protocol, methods, config.out), folds


def _read_folds(config: CompareConfig, protocol: Protocol) -> Folds:
    """The folds that were written by the call that made the protocol; what they are is compared with it afterwards."""
    draws = []
    for number in range(1, protocol.draws + 1):
        path = config.out / folds_name(number)
        cohort = read_cohort(path, config.train.slides)
        if "fold" not in cohort.table:
            remedy = "put back a copy of it, or give another --out"
            raise CohortError.single("no column 'fold'", where=str(path), remedy=remedy)
        check_folds_of(cohort, config)
        draws.append(cohort)
    excluded = tuple(protocol.facts["cohort"]["excluded"])
    return Folds(tuple(draws), bool(protocol.facts["folds"]["drawn"]), excluded)


def _amended(protocol: Protocol, methods: Mapping[str, dict[str, Any]], folder: Path) -> Protocol:
    """The same with methods, versions and a test that are new, which is written."""
    added = {name: plan for name, plan in methods.items() if name not in protocol.methods}
    versions = current_versions()
    known = [protocol.versions, *(entry["versions"] for entry in protocol.amendments if "versions" in entry)]
    changes: dict[str, Any] = {"methods": list(added)} if added else {}
    if versions not in known:
        changes["versions"] = versions
    tests = [protocol.facts["primary"]["test"], *(entry["test"] for entry in protocol.amendments if "test" in entry)]
    if tests[-1] != TEST:
        changes["test"] = TEST
    if not changes:
        return protocol
    scored = len(list(folder.glob("cells/*/*/seed-*.csv")))
    amendment = {"time": _now(), "trainings_scored": scored, **changes}
    amended = replace(protocol, methods={**protocol.methods, **added}, amendments=(*protocol.amendments, amendment))
    _write(amended, folder)
    return amended


def _facts(config: CompareConfig, folds: Folds, reference: str) -> dict[str, Any]:
    table, train = folds.cohort.table, config.train
    return {
        "manifest": _manifest(config),
        "cohort": {
            "files": len(table),
            "slides": int(table["slide"].nunique()),
            "patients": int(table["patient"].nunique()),
            "classes": list(folds.cohort.classes),
            "unit": train.unit,
            "group": train.group,
            "excluded": list(folds.excluded),
        },
        "design": NESTED if config.nested else DESIGN,
        "folds": folds.facts(),
        "seeds": list(range(train.seed, train.seed + config.seeds)),
        "selection": {
            "split": "valid",
            "metric": train.monitor,
            "chosen": CHOICE,
            "settings": len(config.points(reference)),
        },
        "reference": reference,
        "primary": {"test": TEST, "resamples": config.resamples, "seed": train.seed, "correction": "Holm"},
    }


def _manifest(config: CompareConfig) -> dict[str, str]:
    try:
        return {"sha256": hashlib.sha256(config.train.manifest.expanduser().read_bytes()).hexdigest()}
    except OSError as error:
        raise CohortError.single(
            f"cannot read the table, {error.strerror}", where=str(config.train.manifest), remedy="check the path"
        ) from None


def _methods(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Each method's options, its recipes where it has several parts, and the settings that are tried."""
    found: dict[str, dict[str, Any]] = {}
    for name in config.names:
        options = config.train_config(name, {})
        found[name] = {"method": options.method, "options": _options(options)}
        if method_info(options.method).parts > 1:
            found[name]["recipes"] = [_plain(dataclasses.asdict(r)) for r in _recipes(options)]
        found[name]["settings"] = [_plain(point) for point in config.points(name)]
    return found


def _recipes(options: TrainConfig) -> list[Any]:
    return [options.recipe(part) for part in range(1, method_info(options.method).parts + 1)]


def _options(options: TrainConfig) -> dict[str, Any]:
    """What decides a training's numbers. Of a file of weights its content counts, of folders whether there is one."""
    values = {name: value for name, value in options.to_dict().items() if name not in WITHOUT_EFFECT}
    for name in _PATHS:
        values[name] = values[name] is not None
    weights = values["weights"]
    if weights is not None and Path(weights).expanduser().is_file():
        values["weights"] = f"sha256:{file_sha256(Path(weights).expanduser())}"
    return values


def _plain(point: Point) -> dict[str, Any]:
    """Values as JSON brings them back."""
    return dict(json.loads(json.dumps(point, default=str)))


def _differences(before: Any, now: Any, folder: Path, where: str = "") -> Iterator[Problem]:
    """What differs, leaf by leaf; methods that only one of them has do not."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before:
            yield from _differences(before[key], now.get(key), folder, f"{where}.{key}".lstrip("."))
    elif before != now:
        remedy = "call it as it was begun, or give another --out"
        if where == "manifest.sha256":
            yield Problem("the manifest is not the one that this comparison began with", str(folder / NAME), remedy)
        else:
            yield Problem(f"{where} was {_short(before)}, and is now {_short(now)}", str(folder / NAME), remedy)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_empty(folder: Path) -> None:
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(not _FOLDS.fullmatch(name) and not name.startswith(".") and not name.endswith(".part") for name in held):
        raise RunError.single(
            "the folder holds something else than a comparison", where=str(folder), remedy="give another --out"
        )


def _write(protocol: Protocol, folder: Path) -> None:
    with disk_errors(folder):
        write_atomically(folder / NAME, protocol.to_json())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
