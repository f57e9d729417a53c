"""The process of one row of ``bench memory``: a case comes on standard input as JSON, its figures leave on standard output."""

from __future__ import annotations

import json
import sys

from wholeslide.allocator import fix_thresholds
from wholeslide.errors import WholeslideError


def main() -> int:
    """Set the allocator before torch makes its first tensor, then measure; what a user can mend is said in a line."""
    fix_thresholds()
    from wholeslide.bench.memory import MENDABLE, MemoryCase
    from wholeslide.bench.memory_step import measure

    try:
        row = measure(MemoryCase(**json.load(sys.stdin)))
    except WholeslideError as error:
        sys.stderr.write(f"{error}\n")
        return MENDABLE
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
