"""The numbers of a comparison: every method's with intervals, and the tests against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import pandas as pd

from wholeslide.compare.cells import Cell, Record
from wholeslide.compare.delong import DeLong, delong
from wholeslide.compare.holm import holm
from wholeslide.compare.paired import Difference, paired_difference
from wholeslide.compare.predictions import Collected
from wholeslide.compare.protocol import Protocol
from wholeslide.compare.resampling import Resampled, bootstrap, fold_strata, rows_of_folds
from wholeslide.metrics import METRICS, Scored, Unit, aggregate, percentiles

_LEVEL = 0.05
"""Of the family of tests, where a note speaks of it."""


@dataclass(frozen=True)
class Figure:
    """A value and its 95% interval, where there is one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cost:
    """What a method took: means of a training, the largest peak of memory, weights that are trained.

    ``trainings`` are those that are finished. The peak is that of a GPU where there is one, else the resident memory.
    """

    trainings: int
    train_seconds: float | None
    cpu_seconds: float | None
    test_seconds: float | None
    peak_bytes: int | None
    peak_device_bytes: int | None
    trained_parameters: int | None


@dataclass(frozen=True)
class FoldScores:
    """One training on its test fold: every metric of the fold's units, by name."""

    fold: str
    seed: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One method. ``figures`` are by metric, and empty where ``reasons`` say why it is incomplete; so is ``by_fold``.

    ``figures`` are of the probabilities averaged over seeds, ``by_fold`` of each training alone. ``difference`` is that of the
    AUROC to the reference's, with ``p_holm`` corrected over all methods of the protocol; ``delong`` is there where its conditions
    hold.
    """

    method: str
    reference: bool
    cost: Cost
    reasons: tuple[str, ...]
    figures: Mapping[str, Figure]
    by_fold: tuple[FoldScores, ...] = ()
    difference: Difference | None = None
    p_holm: float | None = None
    delong: DeLong | None = None


@dataclass(frozen=True)
class Summary:
    """``units``, files and patients are those that are scored, and ``notes`` what limits the numbers."""

    rows: tuple[Row, ...]
    units: int
    files: int
    patients: int
    notes: tuple[str, ...]


def summarise(protocol: Protocol, folds: pd.DataFrame, cells: Sequence[Cell], collected: Collected) -> Summary:
    """Score all complete methods on the same resamples of the patients."""
    units, resampled = _resampled(protocol, folds, collected)
    reference = resampled.get(protocol.reference)
    others = [name for name in protocol.methods if name != protocol.reference]
    differences = {
        name: paired_difference(resampled[name], reference)
        for name in others
        if reference is not None and name in resampled
    }
    adjusted = holm({name: differences[name].p if name in differences else None for name in others})
    unfit = _unfit_for_delong(protocol, folds, units)
    classical = {} if unfit else _delong_tests(protocol, folds, units, list(differences), collected)
    rows = [
        Row(
            method=name,
            reference=name == protocol.reference,
            cost=_cost([cell.record for cell in cells if cell.method == name]),
            reasons=tuple(collected.incomplete.get(name, ())),
            figures=_figures(resampled[name]) if name in resampled else {},
            by_fold=tuple(_fold_scores(protocol, folds, collected, name)) if name in resampled else (),
            difference=differences.get(name),
            p_holm=adjusted.get(name),
            delong=classical.get(name),
        )
        for name in protocol.methods
    ]
    return Summary(
        rows=tuple(rows),
        units=len(units) // protocol.draws,
        files=int(folds["file"].nunique()),
        patients=int(folds["patient"].nunique()),
        notes=(*_notes(protocol, units, resampled), *([unfit] if unfit else [])),
    )


def _resampled(
    protocol: Protocol, folds: pd.DataFrame, collected: Collected
) -> tuple[pd.DataFrame, dict[str, Resampled]]:
    """The units that are scored, with columns ``patient, fold, label``, and every complete method on their resamples."""
    columns = [f"prob_{name}" for name in protocol.classes]
    empty = folds.assign(**dict.fromkeys(columns, 0.0))
    units = _units(empty, folds, protocol)
    probabilities = {}
    for name, table in collected.predictions.groupby("method", sort=False):
        found = _units(table, folds, protocol)
        assert found[["patient", "fold", "label"]].equals(units[["patient", "fold", "label"]])
        probabilities[str(name)] = found[columns].to_numpy(dtype=float)
    primary = protocol.facts["primary"]
    resampled = bootstrap(units, probabilities, protocol.classes, resamples=primary["resamples"], seed=primary["seed"])
    return units, resampled


def _units(table: pd.DataFrame, folds: pd.DataFrame, protocol: Protocol) -> pd.DataFrame:
    """A row a unit, in the order of the cohort's files, with its fold and draw; draw after draw."""
    unit: Unit = protocol.facts["cohort"]["unit"]
    found = []
    for draw in range(1, protocol.draws + 1):
        names = [name for name in protocol.folds if protocol.draw_of(name) == draw]
        inside = folds[folds["fold"].isin(names)]
        ordered = table[table["fold"].isin(names)].set_index("file").loc[inside["file"]].reset_index()
        units = aggregate(ordered, unit, protocol.classes)
        fold_of = dict(zip(inside["patient"], inside["fold"], strict=True))
        found.append(units.assign(fold=units["patient"].map(fold_of), draw=draw))
    return pd.concat(found, ignore_index=True)


def _figures(resampled: Resampled) -> dict[str, Figure]:
    found = {}
    for metric in METRICS:
        drawn = resampled.drawn[metric]
        found[metric] = Figure(resampled.value[metric], *percentiles(drawn))
    return found


def _fold_scores(protocol: Protocol, folds: pd.DataFrame, collected: Collected, method: str) -> Iterator[FoldScores]:
    """Of each training of a complete method, seed by seed."""
    own = collected.by_seed[collected.by_seed["method"] == method]
    for seed in protocol.seeds:
        units = _units(own[own["seed"] == seed], folds, protocol)
        for fold in protocol.folds:
            inside = units[units["fold"] == fold]
            found = Scored.of(inside, protocol.classes).metrics(np.ones((1, len(inside))))
            yield FoldScores(fold, seed, {metric: float(found[metric][0]) for metric in METRICS})


def _unfit_for_delong(protocol: Protocol, folds: pd.DataFrame, units: pd.DataFrame) -> str | None:
    """Why DeLong's test cannot be made: it is one of two classes, and takes units as independent."""
    if len(protocol.classes) != 2:
        return f"no test by DeLong: it is for two classes, and there are {len(protocol.classes)}"
    if protocol.draws > 1:
        return "no test by DeLong: it is for one draw of folds"
    if not folds["slide"].nunique() == folds["patient"].nunique() == len(units):
        return "no test by DeLong: it takes one slide a patient, and one unit"
    return None


def _delong_tests(
    protocol: Protocol, folds: pd.DataFrame, units: pd.DataFrame, methods: Sequence[str], collected: Collected
) -> dict[str, DeLong | None]:
    """DeLong's test of each method."""
    positive = protocol.classes[1]
    scores = {
        name: _units(collected.predictions[collected.predictions["method"] == name], folds, protocol)[
            f"prob_{positive}"
        ].to_numpy(dtype=float)
        for name in [protocol.reference, *methods]
        if name not in collected.incomplete
    }
    truth = (units["label"] == positive).to_numpy()
    rows = rows_of_folds(units)
    return {name: delong(truth, scores[name], scores[protocol.reference], rows) for name in methods}


def _cost(records: Sequence[Record]) -> Cost:
    """Of the trainings that are finished."""
    done = [record for record in records if record.state == "finished"]
    devices = [record.peak_device_bytes for record in done if record.peak_device_bytes is not None]
    weights = [record.trained_parameters for record in done if record.trained_parameters is not None]
    return Cost(
        trainings=len(done),
        train_seconds=mean(record.train_seconds for record in done) if done else None,
        cpu_seconds=mean(record.cpu_seconds for record in done) if done else None,
        test_seconds=mean(record.test_seconds for record in done) if done else None,
        peak_bytes=max((record.peak_bytes for record in done), default=None),
        peak_device_bytes=max(devices, default=None),
        trained_parameters=max(weights, default=None),
    )


def _notes(protocol: Protocol, units: pd.DataFrame, resampled: Mapping[str, Resampled]) -> Iterator[str]:
    """What the reader of the numbers has to know."""
    strata = fold_strata(units)[1]
    alone = sum(len(patients) == 1 for patients in strata)
    if alone == len(strata):
        yield "each patient is the only one of a fold and class: no interval and no test can be given"
    elif alone:
        what = "groups of patients of one fold and class have one member, always drawn"
        yield f"{alone} of {len(strata)} {what}: the intervals are too narrow, and p values too small"
    undefined = max((int(np.isnan(found.drawn["auroc"]).sum()) for found in resampled.values()), default=0)
    if undefined:
        yield f"{undefined} resamples without a class in some fold are left out of intervals and tests of the AUROC"
    flat = [name for name, found in resampled.items() if len(found.drawn["auroc"]) and not np.ptp(found.drawn["auroc"])]
    if flat:
        yield f"the AUROC of {', '.join(flat)} is the same on every resample: its interval has no width, which is not certainty"
    raised = [
        name
        for name, found in resampled.items()
        if (low := percentiles(found.drawn["calibration_error"])[0]) is not None
        and found.value["calibration_error"] < low
    ]
    if raised:
        yield f"the calibration error of {', '.join(raised)} is below its interval: the noise of a resample only adds to it"
    if protocol.draws > 1:
        what = f"folds were drawn {protocol.draws} times, and figures are over all draws"
        yield f"{what}; patients are resampled within fold and class of the first, and count the same in all"
    if len(protocol.seeds) > 1:
        what = f"probabilities are averaged over the {len(protocol.seeds)} trainings of a fold before they are scored"
        yield f"{what}; each training's own scores are in results.json"
    tests, resamples = len(protocol.methods) - 1, int(protocol.facts["primary"]["resamples"])
    if 2 / (resamples + 1) * tests > _LEVEL:
        yield f"{resamples} resamples are too few for any p (Holm) of {tests} tests to fall below {_LEVEL}"
