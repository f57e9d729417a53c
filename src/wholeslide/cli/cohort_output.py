"""What the commands that build a manifest share: writing it, and counting what is in it and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wholeslide.cli.output import print_table, write
from wholeslide.cohort.config import SPLITS
from wholeslide.errors import ConfigError, Problem

if TYPE_CHECKING:
    from wholeslide.cohort.assembly import Assembly

_COUNTED = ("patient", "slide", "site")


def refuse_overwriting(out: Path, inputs: Sequence[Path]) -> None:
    """Raise a ConfigError where a table that is read would be overwritten."""
    from wholeslide.cohort.assembly import excluded_path

    problems = [
        Problem("this would overwrite a table that is read", f"--out {out}", "give another file")
        for written in (out, excluded_path(out))
        for path in inputs
        if written.exists() and path.exists() and written.samefile(path)
    ]
    if problems:
        raise ConfigError(problems)


def finish(assembly: Assembly, out: Path, *, next_step: str) -> int:
    """Write both tables, print what they hold, and return the exit status."""
    from wholeslide.cohort.assembly import excluded_path, write_assembly

    write_assembly(assembly, out)
    table, excluded = assembly.table, assembly.excluded
    columns = [name for name in _COUNTED if name in table]
    splits = [name for name in SPLITS if "split" in table and (table["split"] == name).any()]
    rows = []
    for label in [*sorted(set(table["label"])), ""]:
        inside = table[table["label"] == label] if label else table
        counts = [inside[name].nunique() for name in columns]
        rows.append([label or "all", *counts, *(int((inside["split"] == name).sum()) for name in splits)])
    write(f"{len(table)} files in {out}")
    print_table(["label", *(f"{name}s" for name in columns), *splits], rows)
    reasons = [[reason, int(count)] for reason, count in excluded["reason"].value_counts(sort=False).items()]
    if reasons:
        write(f"{len(excluded)} files left out, in {excluded_path(out)}")
        print_table(["reason", "files"], reasons)
    else:
        write(f"No file is left out ({excluded_path(out)} is empty).")
    write(f"Next: {next_step}")
    return 0
