"""Bytes that are really allocated, to compare an estimate with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Meter:
    """Bytes allocated, by torch's profiler on a CPU and by the caching allocator on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.live: dict[str, int] = {}  # at the end of each section
        self.peak: dict[str, int] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Record what is alive after the block and the most that was during it, both relative to its beginning."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            self.live[name] = torch.cuda.memory_allocated() - before
            self.peak[name] = torch.cuda.max_memory_allocated() - before
            return
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            most = max(most, alive)
        self.live[name], self.peak[name] = alive, most


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
