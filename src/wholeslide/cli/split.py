"""``wholeslide split``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.output import print_table, write
from wholeslide.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SplitArguments:
    """What is split, and where the result goes.

    Args:
        manifest: CSV of the cohort: file, label, and where known slide and patient.
        out: The CSV that is written: the manifest with a column `split` (or `fold`).
        fractions: Parts of the training, validation and test split; they add up to 1.
        folds: Number of folds, in place of the fractions.
        group: Column whose values are never cut; patients never are, whatever the column.
        seed: Seed of the draw. The order of the manifest's rows does not matter.
    """

    manifest: Path
    out: Path
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    folds: int | None = None
    group: str = "patient"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.out.exists() and self.manifest.exists() and self.out.samefile(self.manifest):
            raise ConfigError.single(
                "this would overwrite the manifest", where=f"--out {self.out}", remedy="give another file"
            )


def run(arguments: SplitArguments) -> int:
    """Draw, write, and count."""
    from wholeslide.cohort import fold_cohort, read_cohort, split_cohort, write_split

    group, seed = arguments.group, arguments.seed
    cohort = read_cohort(arguments.manifest)
    if arguments.folds is not None:
        cohort = fold_cohort(cohort, folds=arguments.folds, group=group, seed=seed)
    else:
        cohort = split_cohort(cohort, fractions=arguments.fractions, group=group, seed=seed)
    write_split(cohort, arguments.out)
    column = "split" if arguments.folds is None else "fold"
    table = cohort.table
    names = [name for name in ("train", "valid", "test") if name in set(table[column])]
    parts = names or sorted(set(table[column]), key=int)
    rows = []
    for part in parts:
        inside = table[table[column] == part]
        counts = [int((inside["label"] == name).sum()) for name in cohort.classes]
        rows.append([part, inside["patient"].nunique(), len(inside), *counts])
    print_table([column, "patients", "files", *cohort.classes], rows)
    write(f"Written to {arguments.out}")
    return 0


COMMAND = Command(
    name="split",
    summary="Split a manifest into training, validation and test, or into folds, never cutting a patient.",
    arguments=SplitArguments,
    positionals=("manifest",),
    run=run,
    example="wholeslide split labels.csv --out split.csv --group site",
)
