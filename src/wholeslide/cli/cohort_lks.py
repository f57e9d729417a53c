"""``wholeslide cohort lks``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.cohort_output import finish, refuse_overwriting
from wholeslide.cli.command import Command


@dataclass(frozen=True, kw_only=True)
class CohortLksArguments:
    """Where the images are, and where the manifest goes.

    Args:
        folder: Folder of the images: Train/ and Test/ with Train_Labels.csv and Test_Labels.csv, or a folder a class.
        out: The manifest that is written; labels.csv has labels-excluded.csv beside it, with each image that is left out and
            why.
        labels: Table of the images' classes, in place of those in the folder: columns image and label, and where known split
            and patient.
    """

    folder: Path
    out: Path
    labels: Path | None = None


def run(arguments: CohortLksArguments) -> int:
    """Read, write, and count."""
    from wholeslide.cohort.lks import assemble_lks, label_tables

    read = label_tables(arguments.folder) if arguments.labels is None else [arguments.labels]
    refuse_overwriting(arguments.out, read)
    assembly = assemble_lks(arguments.folder, arguments.labels)
    kept = " --keep-test" if "split" in assembly.table and (assembly.table["split"] == "test").any() else ""
    return finish(assembly, arguments.out, next_step=f"wholeslide split {arguments.out} --out SPLIT.csv{kept}")


COMMAND = Command(
    name="cohort lks",
    summary="Build a manifest of the Liver-Kidney-Stomach slides from their folder.",
    arguments=CohortLksArguments,
    positionals=("folder",),
    run=run,
    example="wholeslide cohort lks LKS/ --out lks.csv",
)
