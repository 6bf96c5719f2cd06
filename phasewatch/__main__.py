"""``python -m phasewatch``, which is the command ``phasewatch``."""

import sys

from phasewatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
