"""The process of one row of ``bench memory``: a case comes on standard input as JSON, its figures leave on standard output."""

from __future__ import annotations

import json
import sys

from wholeslide.allocator import fix_thresholds


def main() -> None:
    """Set the allocator before torch makes its first tensor, then measure."""
    fix_thresholds()
    from wholeslide.bench.memory import MemoryCase
    from wholeslide.bench.memory_step import measure

    sys.stdout.write(json.dumps(measure(MemoryCase(**json.load(sys.stdin)))) + "\n")


if __name__ == "__main__":
    main()
