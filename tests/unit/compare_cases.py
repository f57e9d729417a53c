"""What tests of comparisons share: a cohort of empty files, and methods that know more or less of the truth, untrained."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from wholeslide.cohort.manifest import read_cohort
from wholeslide.cohort.splits import split_by_fold
from wholeslide.compare.cell_run import Tools, run_cell
from wholeslide.compare.cells import Case
from wholeslide.compare.config import CompareConfig
from wholeslide.compare.launch import Ending
from wholeslide.errors import RunError, SlideError
from wholeslide.slides.lock import alone_on
from wholeslide.train.config import TrainConfig

SIGNAL = {"max": 0.2, "average": 0.5, "abmil": 1.5, "gabmil": 1.5, "clam-sb": 2.5}
"""How much of the truth each method sees."""


def write_cohort(folder: Path, count: int = 30, *, classes: str = "ab", header: str = "", column: str = "") -> Path:
    """Files with nothing in them, each of its own patient. ``column`` is formatted with n, the file's number."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"file,patient,label{header}"]
    for number in range(count):
        (folder / f"s{number}.png").write_bytes(str(number).encode())
        label = classes[number % len(classes)]
        rows.append(f"s{number}.png,p{number},{label}" + column.format(n=number // len(classes)))
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def config(
    manifest: Path, out: Path, *methods: str, train: dict[str, Any] | None = None, **options: Any
) -> CompareConfig:
    """A comparison with few resamples."""
    training = TrainConfig(
        manifest=manifest, slides=manifest.parent, out=out, mpp="native", quiet=True, **(train or {})
    )
    asked: dict[str, Any] = {"folds": 3, "resamples": 100, **options}
    return CompareConfig(methods=methods or ("max", "abmil"), train=training, **asked)


@dataclass
class Fake:
    """Stands for `train` and `evaluate_run`, and remembers what it was asked.

    ``broken`` is a method that cannot be trained; ``stop_after`` leaves like a signal once so many cells are trained.
    """

    broken: str = ""
    stop_after: int | None = None
    trained: list[str] = field(default_factory=list)
    scored: list[tuple[str, str]] = field(default_factory=list)

    def work(self, case: Case) -> Ending:
        """Does a cell in this process."""
        try:
            with alone_on(case.cell.run):
                run_cell(case, Tools(self.train, self.evaluate, lambda run: 123))
        except RunError:
            return "busy"
        return "done"

    def train(self, config: TrainConfig) -> None:
        if len(self.trained) == self.stop_after:
            raise KeyboardInterrupt
        if config.method == self.broken:
            raise SlideError.single("it does not train", where="slide s1", remedy="mend it")
        assert config.resume
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "options.json").write_text(json.dumps(config.to_dict()))
        self.trained.append(f"{config.method} {config.fold} {config.seed} {config.lr}")

    def evaluate(self, run: Path, split: str) -> None:
        """Predict by noise and, for better methods and rates, more of the truth."""
        asked = TrainConfig.from_dict(json.loads((run / "options.json").read_text()))
        assert asked.fold is not None
        assert (asked.manifest.parent / "protocol.json").is_file(), "scores without a protocol"
        self.scored.append((str(run.relative_to(asked.manifest.parent)), split))
        cohort = read_cohort(asked.manifest, asked.slides)
        table = split_by_fold(cohort, asked.fold, asked.valid_fold).split(split)
        rows = []
        for row in table.to_dict("records"):
            seed = zlib.crc32(f"{asked.method} {asked.seed} {asked.lr} {row['file']}".encode())
            logits = np.random.default_rng(seed).normal(size=len(cohort.classes))
            logits[cohort.classes.index(row["label"])] += SIGNAL[asked.method] + 100 * (asked.lr or 0)
            powers = np.exp(logits) / np.exp(logits).sum()
            names = {key: row[key] for key in ("file", "slide", "patient", "label")}
            chosen = cohort.classes[int(powers.argmax())]
            rows.append(
                {**names, "prediction": chosen, **{f"prob_{c}": p for c, p in zip(cohort.classes, powers, strict=True)}}
            )
        predictions = pd.DataFrame(rows)
        (run / "predictions").mkdir(exist_ok=True)
        predictions.to_csv(run / "predictions" / f"{split}.csv", index=False)
