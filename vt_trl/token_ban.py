"""Tokens that a policy cannot produce, in every forward: generation, old, reference and training passes alike.

A sampled vision placeholder would need a picture that does not exist. Banning it only while sampling would leave
rollout and trainer with different distributions, so the ban is a constant bias on the output head: the same in every
forward, no parameter, in no checkpoint, and gone when the saved model is loaded elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

_BAN = -1e4  # exp(-1e4) is exactly 0 in every float format, and the number is finite in fp16


def ban_tokens(model: nn.Module, token_ids: Sequence[int]) -> None:
    """Give the output head of ``model`` a fixed bias of -1e4 on ``token_ids``.

    The head must be a linear layer without a trained bias, as in all supported families; raises ValueError otherwise.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or (getattr(head, "bias", None) is not None and "bias" in head._parameters):
        raise ValueError(
            f"Cannot ban tokens: the output head {type(head).__name__} has a trained bias or no weight. "
            f"Vision placeholders could then be sampled."
        )
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 keeps the full shape of a partitioned weight there
    bias = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
    bias[list(token_ids)] = _BAN
    head._parameters.pop("bias", None)  # nn.Linear(bias=False) keeps the name reserved for a parameter
    head.register_buffer("bias", bias, persistent=False)


def declare_whole(model: nn.Module) -> None:
    """Tell TRL's fused head that the bias of :func:`ban_tokens` is whole on every process.

    It takes a bias for a parameter that ZeRO-3 has partitioned or FSDP2 has sharded along with the weight, and would
    gather it. The marks sit on the tensor and are lost when the model moves, so they are set before each forward.
    """
    bias = model.get_output_embeddings().bias
    if is_deepspeed_zero3_enabled() and not hasattr(bias, "ds_status"):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        bias.ds_status = ZeroParamStatus.AVAILABLE
    if not hasattr(bias, "full_tensor"):
        bias.full_tensor = partial(_itself, weakref.ref(bias))


def _itself(tensor: weakref.ref[torch.Tensor]) -> torch.Tensor:
    return tensor()
