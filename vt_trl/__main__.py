"""``python -m vt_trl`` and ``accelerate launch -m vt_trl RECIPE``."""

import sys

from vt_trl.cli import main

if __name__ == "__main__":
    sys.exit(main())
