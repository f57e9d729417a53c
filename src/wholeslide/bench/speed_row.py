"""The process of one row of ``bench speed``."""

from __future__ import annotations

import sys

from wholeslide.allocator import fix_thresholds
from wholeslide.bench.children import answer


def main() -> int:
    """Set the allocator before torch makes its first tensor, then measure."""
    fix_thresholds()
    from wholeslide.bench.pipelines.case import SpeedCase
    from wholeslide.bench.speed_step import measure

    return answer(lambda case: measure(SpeedCase(**case)))


if __name__ == "__main__":
    sys.exit(main())
