"""``wholeslide cohort gdc``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.cohort_output import finish, refuse_overwriting
from wholeslide.cli.command import Command
from wholeslide.cli.failures import write_line


@dataclass(frozen=True, kw_only=True)
class CohortGdcArguments:
    """Which tables of GDC are read, and where the manifest goes.

    Args:
        tables: Tables of the GDC portal, in any order: download manifests, sample sheets, clinical.tsv. One has to list files
            (manifest or sample sheet), and one to tell the patients' projects (sample sheet or clinical.tsv).
        out: The manifest that is written; labels.csv has labels-excluded.csv beside it, with each file that is left out and why.
        projects: Projects that are taken, as TCGA-LUAD,TCGA-LUSC; left out: all that the tables name. The label is the
            project without TCGA-.
        slides: Folder that the slides were downloaded to: those that are not there, cannot be opened or tell no microns per
            pixel are left out, too.
    """

    tables: list[Path]
    out: Path
    projects: tuple[str, ...] = ()
    slides: Path | None = None


def run(arguments: CohortGdcArguments) -> int:
    """Read, choose, write, and count."""
    from wholeslide.cohort.assembly import leave_out_unscaled
    from wholeslide.cohort.gdc import assemble_gdc, patients_without_slide
    from wholeslide.cohort.gdc_tables import read_gdc_tables

    refuse_overwriting(arguments.out, arguments.tables)
    tables = read_gdc_tables(arguments.tables)
    assembly = assemble_gdc(tables, projects=arguments.projects)
    if arguments.slides is not None:
        assembly = leave_out_unscaled(assembly, arguments.slides)
        assembly.check(str(arguments.slides))
    lacking = patients_without_slide(assembly, tables, projects=arguments.projects)
    if lacking:
        write_line(f"{lacking} patients of the tables have no slide in the manifest")
    return finish(assembly, arguments.out, next_step=f"wholeslide split {arguments.out} --out SPLIT.csv")


COMMAND = Command(
    name="cohort gdc",
    summary="Build a manifest of TCGA's diagnostic slides from the tables of the GDC portal.",
    arguments=CohortGdcArguments,
    positionals=("tables",),
    run=run,
    example="wholeslide cohort gdc gdc_manifest.txt clinical.tsv --out labels.csv",
)
