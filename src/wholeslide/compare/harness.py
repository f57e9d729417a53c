"""`compare`: freeze the protocol, train what is left, test once, and write what was found."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wholeslide.baselines.registry import method_info
from wholeslide.compare.cells import Case, Cell, Record, case_of, grid
from wholeslide.compare.config import CompareConfig, share_of
from wholeslide.compare.folds import Folds
from wholeslide.compare.launch import Ending, in_child
from wholeslide.compare.picture import draw
from wholeslide.compare.predictions import Collected, collect
from wholeslide.compare.protocol import Protocol, freeze, protocol_hash
from wholeslide.compare.summary import Summary, summarise
from wholeslide.compare.tables import comma_separated, latex, markdown
from wholeslide.slides.lock import alone_in
from wholeslide.train.checkpoint import disk_errors, write_atomically
from wholeslide.train.tables import clock

logger = logging.getLogger(__name__)

Worker = Callable[[Case], Ending]


@dataclass(frozen=True)
class Comparison:
    """What a call of `compare` left.

    ``failed`` are the cells that ended by an error, with their records; ``unfinished`` counts those that are in work elsewhere or
    not begun.
    """

    summary: Summary
    failed: tuple[tuple[Cell, Record], ...]
    unfinished: int


def compare(config: CompareConfig, *, worker: Worker = in_child) -> Comparison:
    """Compare methods by cross-validation, going on with what there is in ``config.train.out``.

    The protocol is written first. Each method is then trained on each fold with each seed; any number of processes may share the
    work. ``predictions.csv``, ``table.md``, ``.tex`` and ``.csv``, ``results.json`` and ``comparison.png`` are written from what
    is finished; a method of which anything is missing is told as incomplete, and has no statistics.

    Args:
        config: what is compared.
        worker: does a cell, and leaves its record.

    Raises:
        WholeslideError: what the user can mend, all of it together, before anything is trained.
    """
    config.check()
    share, shares = share_of(config.cells)
    out = config.out
    with alone_in(out, wait=True):
        protocol, folds = freeze(config)
    for line in protocol_lines(protocol, folds):
        logger.info("%s", line)
    cells = grid(protocol, out)
    _train(cells[share::shares], config, protocol, worker)
    with alone_in(out, wait=True):
        protocol = Protocol.read(out)  # others may have added methods
        cells = grid(protocol, out)
        collected = collect(cells, folds.table, protocol.classes)
        summary = summarise(protocol, folds.table, cells, collected)
        _write(out, protocol, summary, collected)
    records = [(cell, cell.record) for cell in cells]
    failed = tuple((cell, record) for cell, record in records if record.state == "failed")
    unfinished = sum(record.state == "begun" for _, record in records)
    return Comparison(summary, failed, unfinished)


def protocol_lines(protocol: Protocol, folds: Folds) -> list[str]:
    """What was agreed on, in lines to print."""
    table, facts = folds.cohort.table, protocol.facts
    origin = "drawn" if folds.drawn else "of the manifest"
    origin += f" {protocol.draws} times" if protocol.draws > 1 else ""
    count = len(protocol.folds) // protocol.draws
    lines = [
        f"protocol frozen {protocol.frozen}",
        f"{len(table)} files of {table['patient'].nunique()} patients in {count} folds {origin}; no patient is in two",
    ]
    for part in facts["folds"]["parts"]:
        labels = ", ".join(f"{name} {count}" for name, count in part["labels"].items())
        lines.append(f"  fold {part['fold']}: {part['files']} files of {part['patients']} patients ({labels})")
    trainings = len(protocol.methods) * len(protocol.folds) * len(protocol.seeds)
    tried, validating = facts["selection"]["settings"], len(protocol.validating(protocol.folds[0]))
    each = f" of {tried} settings each" if tried > 1 else ""
    each += f" on {validating} validating folds each" if validating > 1 else ""
    lines.append(f"{trainings} trainings{each}: {', '.join(protocol.methods)}; reference {protocol.reference}")
    return lines


def _train(cells: Sequence[Cell], config: CompareConfig, protocol: Protocol, worker: Worker) -> None:
    """Do the cells that are not finished, one after another."""
    for number, cell in enumerate(cells, start=1):
        if cell.record.state == "finished":
            continue
        told = f"{cell} ({number} of {len(cells)})"
        logger.info("%s: see %s", told, cell.log_path)
        if worker(case_of(cell, config, protocol)) == "busy":
            logger.info("%s: another process has it in work", told)
            continue
        record = cell.record
        if record.state == "failed":
            logger.warning("%s failed: %s", cell, "; ".join(problem.what for problem in record.reasons))
        else:
            logger.info("%s: trained in %s%s", told, clock(record.train_seconds), _left(cells))


def _left(cells: Sequence[Cell]) -> str:
    """How long the others will take, as far as their methods were timed."""
    records = [(cell.method, cell.record) for cell in cells]
    known: dict[str, list[float]] = {}
    for method, record in records:
        if record.state == "finished":
            known.setdefault(method, []).append(record.train_seconds + record.test_seconds)
    left = [method for method, record in records if record.state != "finished"]
    if not left:
        return ""
    seconds = sum(sum(known[method]) / len(known[method]) for method in left if method in known)
    unknown = sum(method not in known for method in left)
    more = f", and {unknown} of methods that were not timed yet" if unknown else ""
    return f"; about {clock(seconds)} for {len(left) - unknown} more{more}"


def notes_of(protocol: Protocol, summary: Summary) -> list[str]:
    """What has to be told with the numbers."""
    facts = protocol.facts
    settings = facts["selection"]["settings"]
    notes = [
        f"{summary.files} files of {summary.patients} patients; {summary.units} {protocol.unit}s are scored. {facts['design']}",
        f"Split: SHA-256 {facts['folds']['sha256']}. Protocol frozen {protocol.frozen}.",
        f"In brackets: 95% intervals over {facts['primary']['resamples']} resamples of the patients within fold and class, the "
        "trained networks held fixed: how much another training would differ is not in them. AUROC is averaged over folds, all "
        "else is taken over all folds together.",
        f"p: two-sided paired bootstrap of the difference in AUROC to {protocol.reference}; p (Holm): corrected over "
        f"{len(protocol.methods) - 1} methods.",
        f"Every method: {len(protocol.seeds)} training(s) and {settings} setting(s) a fold, chosen by validation "
        f"{facts['selection']['metric']} alone. Training time is the mean of a training with all its settings.",
    ]
    if sum(method_info(plan["method"]).kind == "bags" for plan in protocol.methods.values()) > 1:
        notes.append(
            "Features of patches are made once a fold and kept: of the methods that take them, the first pays for them."
        )
    for amendment in protocol.amendments:
        notes.append(
            f"Amended {amendment['time']}, when {amendment['trainings_scored']} trainings had been scored: {_added(amendment)}."
        )
    incomplete = [f"{row.method} is incomplete: {_first(row.reasons)}" for row in summary.rows if row.reasons]
    return [*notes, *(f"{note[0].upper()}{note[1:]}." for note in summary.notes), *incomplete]


def _added(amendment: Mapping[str, Any]) -> str:
    """What an amendment brought."""
    told = [f"methods {', '.join(amendment['methods'])}"] if "methods" in amendment else []
    told += ["other versions of the software"] if "versions" in amendment else []
    told += [f"the test is now: {amendment['test'].rstrip('.')}"] if "test" in amendment else []
    return "; ".join(told)


def _first(reasons: Sequence[str]) -> str:
    return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def _write(out: Path, protocol: Protocol, summary: Summary, collected: Collected) -> None:
    """Tables, predictions, and everything as JSON; the picture where there is anything to draw."""
    notes = notes_of(protocol, summary)
    tables = {"predictions.csv": collected.predictions.drop(columns="seed", errors="ignore")}
    if len(protocol.seeds) > 1:
        tables["predictions_by_seed.csv"] = collected.by_seed
    texts = {name: table.to_csv(index=False, lineterminator="\n") for name, table in tables.items()}
    texts |= {"table.md": markdown(summary, notes), "table.tex": latex(summary, notes)}
    texts["table.csv"] = comma_separated(summary)
    results = {
        "protocol_sha256": protocol_hash(out),
        "folds": protocol.facts["folds"],
        "reference": protocol.reference,
        **dataclasses.asdict(summary),
    }
    texts["results.json"] = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(out):
        for name, text in texts.items():
            write_atomically(out / name, text.encode())
        if any(row.figures for row in summary.rows):
            draw(summary, out / "comparison.png")
