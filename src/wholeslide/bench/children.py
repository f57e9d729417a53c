"""Every row in a process of its own: what it is asked goes in as JSON on standard input, its figures come out likewise."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from wholeslide.errors import WholeslideError

#: The status of a row's process where a user can mend what is wrong.
MENDABLE = 2


def measured_row(module: str, case: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A row: ``facts``, and what ``module`` measured; or that it could not, why, and whether a user can mend it.

    Args:
        module: run as a process; it calls :func:`answer`.
        case: what it is given.
        facts: of the row in any case.
    """
    finished = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(dict(case)), capture_output=True, text=True
    )
    if finished.returncode == 0:
        return {**facts, **json.loads(finished.stdout.splitlines()[-1])}
    said = finished.stderr.strip().splitlines()
    reason = said[-1] if said and finished.returncode > 0 else _ending(finished.returncode)
    return {**facts, "measured": False, "reason": reason, "mendable": finished.returncode == MENDABLE}


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """What a row's process does: measure the case that comes in; what a user can mend is said in a line."""
    try:
        row = measure(json.load(sys.stdin))
    except WholeslideError as error:
        sys.stderr.write("; ".join(str(problem) for problem in error.problems) + "\n")
        return MENDABLE
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


def _ending(status: int) -> str:
    """Why a process said nothing."""
    return "killed by the system, most likely out of memory" if status == -signal.SIGKILL else f"status {status}"
