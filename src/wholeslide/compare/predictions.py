"""The predictions of all cells as one table, after it is seen that every file was predicted once by every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wholeslide.compare.cells import Cell
from wholeslide.errors import RunError

NAMES = ["file", "slide", "patient", "label"]


@dataclass(frozen=True)
class Collected:
    """``predictions`` have a row a method and file, probabilities averaged over seeds; ``by_seed`` a row a training and file.

    ``incomplete`` says of methods why not all of their files are there: what there is of those is in ``by_seed`` only.
    """

    predictions: pd.DataFrame
    by_seed: pd.DataFrame
    incomplete: dict[str, list[str]]


def collect(cells: Sequence[Cell], folds: pd.DataFrame, classes: Sequence[str]) -> Collected:
    """What the cells predicted.

    Args:
        cells: all of the comparison.
        folds: the files of the cohort, with columns ``file, slide, patient, label, fold``.
        classes: of the probabilities.
    """
    columns = [f"prob_{name}" for name in classes]
    tables: list[pd.DataFrame] = []
    incomplete: dict[str, list[str]] = {}
    for cell in cells:
        expected = folds.loc[folds["fold"] == cell.fold, NAMES].reset_index(drop=True)
        try:
            found = _read(cell, expected, columns)
        except RunError as error:
            incomplete.setdefault(cell.method, []).extend(f"{cell}: {problem.what}" for problem in error.problems)
            continue
        tables.append(found.assign(method=cell.method, fold=cell.fold, seed=cell.seed))
    order = ["method", "fold", "seed", *NAMES, *columns]
    by_seed = pd.concat(tables, ignore_index=True)[order] if tables else pd.DataFrame(columns=order)
    complete = by_seed[~by_seed["method"].isin(list(incomplete))]
    averaged = complete.groupby(["method", "fold", *NAMES], sort=False, as_index=False)[columns].mean()
    return Collected(_with_prediction(averaged, classes), _with_prediction(by_seed, classes), incomplete)


def read_predictions(path: Path) -> pd.DataFrame:
    """A table of predictions as it was written: names as text, probabilities bit by bit, NaN where one is empty.

    Raises:
        RunError: it is not there, or is none.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        columns = [str(name) for name in table if str(name).startswith("prob_")]
        return table.assign(**{name: [float(text or "nan") for text in table[name]] for name in columns})
    except FileNotFoundError:
        raise RunError.single("not finished", where=str(path), remedy="call compare again") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its predictions cannot be read: {error}") from error


def _read(cell: Cell, expected: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The predictions of a cell, in the order of its fold's files.

    Raises:
        RunError: it is not finished, or they are not those of the fold's files, each once.
    """
    record = cell.record
    if record.state == "failed":
        raise RunError(record.reasons)
    if record.state != "finished":
        raise RunError.single("not finished", where=str(cell.run), remedy="call compare again")
    found = read_predictions(cell.predictions_path)
    lacking = [name for name in (*NAMES, *columns) if name not in found]
    others = [name for name in map(str, found) if name.startswith("prob_") and name not in columns]
    if lacking or others:
        raise _damaged(cell.predictions_path, f"columns {', '.join([*lacking, *others])} are lacking or too many")
    files, wanted = found["file"].tolist(), expected["file"].tolist()
    if sorted(files) != sorted(wanted):
        missing, surplus = len(set(wanted) - set(files)), len(files) - len(set(files) & set(wanted))
        what = f"{missing} of {len(wanted)} files are not predicted, and {surplus} rows are too many"
        raise _damaged(cell.predictions_path, what)
    found = found.set_index("file").loc[wanted].reset_index()
    if not found[NAMES].equals(expected.astype(dict.fromkeys(NAMES, str))):
        raise _damaged(cell.predictions_path, "its slides, patients or labels are not those of the folds")
    if not np.isfinite(found[columns].to_numpy()).all():
        raise _damaged(cell.predictions_path, "there are probabilities that are no numbers")
    return found[[*NAMES, *columns]]


def _with_prediction(table: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """With the most probable class, before the probabilities."""
    columns = [f"prob_{name}" for name in classes]
    chosen = table[columns].to_numpy(dtype=np.float64).argmax(axis=1) if len(table) else np.empty(0, dtype=np.int64)
    names = [name for name in table if name not in columns]
    return table[names].assign(prediction=np.asarray(classes, dtype=object)[chosen], **table[columns])


def _damaged(path: Path, what: str) -> RunError:
    return RunError.single(what, where=str(path), remedy="remove the record beside it, and call compare again")
