"""``python -m vt_trl.preflight RECIPE``, the same as ``vt-trl preflight RECIPE``."""

import sys

from vt_trl.cli import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
