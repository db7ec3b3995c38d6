"""Weights that FSDP2 has divided between processes, made whole for as long as something samples with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def unsharded(model: nn.Module, reshard_after_forward: bool = True) -> Iterator[None]:
    """Within it every process holds all weights of ``model``, so that a forward needs no other process.

    Entering is a collective. Otherwise each forward would gather layer by layer, and processes that sample different
    numbers of tokens or turns would wait for each other for ever. A model that FSDP2 has not wrapped is left alone.
    ``reshard_after_forward``: what the units below the root go back to; the root never gives its weights up by itself.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if shards:
        # Sampling calls parts of the model before the whole, and the first would take itself for the root.
        model._get_fsdp_state()._lazy_init()
    for shard in shards:
        if shard is not model:
            shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            if shard is not model:
                shard.set_reshard_after_forward(reshard_after_forward, recurse=False)
