"""The process of one row of ``bench io``."""

from __future__ import annotations

import sys

from wholeslide.allocator import fix_thresholds
from wholeslide.bench.children import answer


def main() -> int:
    """Set the allocator as our commands do, then measure."""
    fix_thresholds()
    from wholeslide.bench.io import IoCase
    from wholeslide.bench.io_step import measure

    return answer(lambda case: measure(IoCase(**case)))


if __name__ == "__main__":
    sys.exit(main())
