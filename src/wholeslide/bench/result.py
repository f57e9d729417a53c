"""What a benchmark has measured so far, on disk from its first row on, so that one that was cut off is gone on with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from wholeslide.bench.environment import environment
from wholeslide.slides.files import write_atomically

Row = dict[str, Any]

_log = logging.getLogger(__name__)

#: Timed anew by every call; all else has to be the same where rows are to stand in one table.
_TIMED = "gemm_gflops"


class Result:
    """Rows, and the environment that they were measured in.

    Args:
        out: the JSON file, written after each row; left out: none is.
        command: that measures them, with all its options.
    """

    def __init__(self, out: Path | None = None, command: str = "") -> None:
        self._out, self._command = out, command
        self.environment: dict[str, Any] = {}
        self.rows: list[Row] = []

    def begin(self) -> None:
        """See what the environment is, and take the rows of the same command that was cut off in the same environment."""
        self.environment = environment()
        before = self._before()
        if before is not None:
            self.environment, self.rows = before["environment"], before["rows"]
            _log.warning("%s: goes on behind the %d rows that are there", self._out, len(self.rows))

    def add(self, row: Row) -> None:
        """Keep one more row.

        Raises:
            RunError: the disk is full; the rows before are still there.
        """
        self.rows.append(row)
        self._write(complete=False)

    def finish(self) -> None:
        """Say that these are all rows: the same command then measures anew.

        Raises:
            RunError: the disk is full.
        """
        self._write(complete=True)

    def _write(self, *, complete: bool) -> None:
        if self._out is None:
            return
        content = {
            "environment": self.environment,
            "command": self._command,
            "complete": complete,
            "rows": self.rows,
        }
        with write_atomically(self._out) as beside:
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _before(self) -> dict[str, Any] | None:
        """What the file has, if that can be gone on with."""
        if self._out is None or not self._out.exists():
            return None
        try:
            content = json.loads(self._out.read_bytes())
            is_same = (
                content["complete"] is False
                and content["command"] == self._command
                and _lasting(content["environment"]) == _lasting(self.environment)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # another program's, or an older version's
        # A commit with changes may be another one each time.
        has_changes = str(self.environment["commit"]).endswith("+")
        return content if is_same and not has_changes else None


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != _TIMED}
