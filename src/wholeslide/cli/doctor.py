"""``wholeslide doctor``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from wholeslide.cli.command import Command
from wholeslide.cli.failures import MENDABLE
from wholeslide.cli.output import print_json, write


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """What is checked.

    Args:
        folder: The folder in which runs are written, whose disk is looked at.
        json: Write JSON.
    """

    folder: Path = Path()
    json: bool = False


def run(arguments: DoctorArguments) -> int:
    """A line for each check; 2 if something is broken."""
    from wholeslide.doctor import examine

    checks = examine(arguments.folder)
    if arguments.json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            remedy = f": {check.remedy}" if check.remedy else ""
            write(f"{check.status:<5} {check.name:<{width}}  {check.found}{remedy}")
    return MENDABLE if any(check.status == "broken" for check in checks) else 0


COMMAND = Command(
    name="doctor",
    summary="Check this installation, and say what to mend.",
    arguments=DoctorArguments,
    run=run,
    example="wholeslide doctor",
)
