"""``python -m wholeslide``."""

import sys

from wholeslide.cli import main

if __name__ == "__main__":
    sys.exit(main())
