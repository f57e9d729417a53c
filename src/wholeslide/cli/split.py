"""``wholeslide split``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wholeslide.cli.command import Command
from wholeslide.cli.failures import write_line
from wholeslide.cli.output import print_table, write
from wholeslide.cohort.config import SPLITS, SplitConfig
from wholeslide.errors import ConfigError

if TYPE_CHECKING:
    from wholeslide.cohort.manifest import Cohort


@dataclass(frozen=True, kw_only=True)
class SplitArguments:
    """What is split, and where the result goes.

    Args:
        manifest: CSV of the cohort: file, label, and where known slide and patient.
        out: The CSV that is written: the manifest with a column `split` (or `fold`). With --repeats, folds.csv stands for
            folds-1.csv, folds-2.csv and so on.
    """

    manifest: Path
    out: Path
    draw: SplitConfig

    def __post_init__(self) -> None:
        if self.out.exists() and self.manifest.exists() and self.out.samefile(self.manifest):
            raise ConfigError.single(
                "this would overwrite the manifest", where=f"--out {self.out}", remedy="give another file"
            )


def run(arguments: SplitArguments) -> int:
    """Draw, write, and count."""
    from wholeslide.cohort.manifest import read_cohort

    draw = arguments.draw
    cohort = read_cohort(arguments.manifest)
    replaced = "fold" if draw.folds is not None else "split"
    if replaced in cohort.table.columns and cohort.table[replaced].fillna("").astype(str).str.strip().ne("").any():
        kept = ", but for what is tested" if draw.keep_test else ""
        write_line(f"the column {replaced} of {arguments.manifest} is drawn anew{kept}")
    for number in range(draw.repeats):
        out = arguments.out
        if draw.repeats > 1:
            out = out.with_name(f"{out.stem}-{number + 1}{out.suffix}")
        _write(cohort, replace(draw, seed=draw.seed + number), out)
    return 0


def _write(cohort: Cohort, draw: SplitConfig, out: Path) -> None:
    """One draw, written, and its counts."""
    from wholeslide.cohort.splits import divide_around_test, fold_cohort, split_cohort, write_split

    if draw.folds is not None:
        cohort = fold_cohort(cohort, folds=draw.folds, group=draw.group, seed=draw.seed)
        column, parts = "fold", [str(number) for number in range(draw.folds)]
    else:
        divide = divide_around_test if draw.keep_test else split_cohort
        cohort = divide(cohort, fractions=draw.fractions, sizes=draw.sizes, group=draw.group, seed=draw.seed)
        column, parts = "split", [name for name in SPLITS if len(cohort.split(name))]
    write_split(cohort, out)
    rows = []
    for part in parts:
        inside = cohort.table[cohort.table[column] == part]
        counts = [int((inside["label"] == name).sum()) for name in cohort.classes]
        rows.append([part, inside["patient"].nunique(), len(inside), *counts])
    print_table([column, "patients", "files", *cohort.classes], rows)
    if draw.sizes is not None:
        found = [len(cohort.split(name)) for name in SPLITS]
        write(
            f"Asked for {_listed(draw.sizes)} files ({sum(draw.sizes)}): {_listed(found)} of the {sum(found)} there are."
        )
    fold = " --fold 0" if column == "fold" else ""
    write(f"Written to {out}. Next: wholeslide train {out} --slides SLIDES --out RUN{fold}")


def _listed(sizes: Sequence[int]) -> str:
    return "/".join(map(str, sizes))


COMMAND = Command(
    name="split",
    summary="Split a manifest into training, validation and test, or into folds, never cutting a patient.",
    arguments=SplitArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide split labels.csv --out split.csv --group site",
)
