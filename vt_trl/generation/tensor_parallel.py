"""Training processes that share one vLLM engine: they play the same episodes in step, and each keeps its own rows.

Every process of the group runs its part of the engine (``external_launcher``), so all must submit the same turns in
the same order and draw the same tokens. Given that, environments, which are deterministic, need no communication: rows
are exchanged once, before the first turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class EngineGroup:
    """The ``size`` neighbouring processes that share an engine; a group of one does nothing.

    Making one is a collective of all processes. Raises ValueError unless ``size`` divides their number.
    """

    def __init__(self, size: int = 1, processes: int = 1):
        if processes % size:
            raise ValueError(f"{processes} processes do not divide into groups of {size}")
        self.size = size
        self._group: Any = None
        if size > 1:
            members = [list(range(first, first + size)) for first in range(0, processes, size)]
            self._group, _ = dist.new_subgroups_by_enumeration(members)

    def share(self, rows: Sequence[Any]) -> tuple[list[Any], slice]:
        """The rows of all members in order of rank, and where those of this process lie among them."""
        if self.size == 1:
            return list(rows), slice(0, len(rows))
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(rows), group=self._group)
        rank = dist.get_rank(self._group)
        start = sum(len(part) for part in parts[:rank])
        return [row for part in parts for row in part], slice(start, start + len(rows))

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Within it all members draw the same numbers; afterwards each goes on with its own.

        The seed comes from the first member's stream, so that it follows from the seed of the run.
        """
        if self.size == 1:
            yield
            return
        seeds = [int(torch.randint(2**62, (1,)))] if dist.get_rank(self._group) == 0 else [None]
        dist.broadcast_object_list(seeds, group=self._group, group_src=0)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seeds[0])
            yield
