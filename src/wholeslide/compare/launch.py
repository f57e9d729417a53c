"""Cells in processes of their own: their peaks of memory are theirs alone, and what one leaks or breaks is gone with it."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from typing import Literal

from wholeslide.compare.cells import Case
from wholeslide.compare.worker import BUSY
from wholeslide.errors import Problem, RunError
from wholeslide.slides.lock import alone_on

Ending = Literal["done", "busy"]


def in_child(case: Case) -> Ending:
    """Do a cell in a process, whose words go to the cell's log.

    A signal that ends this process is passed on, and the other's saving waited for.

    Returns:
        ``busy`` where another process has it in work; else what came of it is in its record.
    """
    cell = case.cell
    cell.log_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with alone_on(cell.run):
            pass
    except RunError:
        return "busy"
    command = [sys.executable, "-m", "wholeslide.compare.worker"]
    with cell.log_path.open("ab") as log:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            assert child.stdin is not None
            with suppress(BrokenPipeError), child.stdin as stream:
                stream.write(case.to_json().encode())
            status = child.wait()
        except BaseException:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise
    if status == BUSY:
        return "busy"
    if status != 0:
        _keep_ending(case, status)
    return "done"


def _keep_ending(case: Case, status: int) -> None:
    """Tell in the record how a process ended that could not say so itself."""
    what = f"its process ended with status {status}"
    if status == -signal.SIGKILL:
        what = "killed by the system, most likely out of memory"
    elif status < 0:
        what = f"ended by {signal.Signals(-status).name}"
    problem = Problem(what, str(case.cell.log_path), "see its log, and call again to go on")
    with suppress(RunError), alone_on(case.cell.run):
        case.cell.record.failed([problem]).write(case.cell.record_path)
