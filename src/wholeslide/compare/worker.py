"""The process of one cell: it takes its case as JSON on standard input, and leaves a record."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from wholeslide.allocator import fix_thresholds
from wholeslide.compare.cell_run import run_cell
from wholeslide.compare.cells import Case
from wholeslide.errors import RunError
from wholeslide.slides.lock import alone_on

BUSY = 75
"""Status where another process has the cell in work."""


def work(text: str) -> int:
    """Do the cell of a case, alone."""
    case = Case.from_json(text)
    with ExitStack() as lock:
        try:
            lock.enter_context(alone_on(case.cell.run))
        except RunError:
            return BUSY
        run_cell(case)
    return 0


if __name__ == "__main__":
    fix_thresholds()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    sys.exit(work(sys.stdin.read()))
