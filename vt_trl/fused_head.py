"""TRL's fused output head, on loss positions only, on every device.

TRL leaves out the positions without a label where Triton runs, and scores all of them elsewhere, for accelerators that
compile a program per shape. On a CPU with a vocabulary of 152,064 and images in the sequence that is most of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trl.trainer.utils as trl_utils


@contextmanager
def labelled_positions_only() -> Iterator[None]:
    """Within it, the fused head projects labelled positions only; the results are the same numbers."""
    original = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        trl_utils._use_triton = original
