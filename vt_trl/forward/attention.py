"""Attention over a packed row: every completion looks at its prompt and at itself, and at no other completion.

Transformers' registry of attention functions is where it enters: for a call that brings a layout along the function
here answers, any other call goes to the function that was there before, with its mask, cache and dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vt_trl.forward.layout import Layout

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

HALF = (torch.float16, torch.bfloat16)


def install(implementation: str) -> None:
    """Let the attention ``implementation`` (sdpa, flash_attention_2, …) understand ``layout=`` in a model's forward.

    Raises KeyError when transformers does not know it, as for ``eager``, which each model has a function of its own
    for.
    """
    before = ALL_ATTENTION_FUNCTIONS[implementation]
    if not getattr(before, "knows_layouts", False):
        AttentionInterface.register(implementation, _with_layouts(before))


def _with_layouts(before: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        if layout is None:
            return before(module, query, key, value, attention_mask, *args, **kwargs)
        return packed_attention(query, key, value, layout, kwargs.get("scaling")), None

    attend.knows_layouts = True
    return attend


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None = None
) -> torch.Tensor:
    """(1, T, heads, width) from queries (1, heads, T, width) and keys and values (1, fewer heads, T, width)."""
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        # Rotation leaves queries and keys in single precision; PyTorch's own attention is cast by autocast like this.
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if varlen_attn is not None and query.is_cuda and query.dtype in HALF:
        return by_variable_length(query, key, value, layout, scaling)
    return by_segment(query, key, value, layout, scaling)


def by_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None = None
) -> torch.Tensor:
    """One call of PyTorch's attention per segment; on every device and in every precision."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts = []
    for one in layout.segments:
        own, (first, before) = slice(one.start, one.start + one.length), one.before
        q, k, v = (tensor[:, :, own] for tensor in (query, key, value))
        if before:
            known = slice(first, first + before)
            k, v = torch.cat([key[:, :, known], k], dim=2), torch.cat([value[:, :, known], v], dim=2)
            mask = layout.mask(before, one.length, query.device)
            parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
        else:
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def by_variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None = None
) -> torch.Tensor:
    """One call of the variable-length flash kernel that comes with PyTorch; CUDA and half precision only.

    Each segment is a sequence of its own whose keys are gathered from prompt and branch. Where there are more keys
    than queries the kernel's causal mask ends at the last of both, which is what a branch needs.
    """
    index, queries, keys, longest_query, longest_key = layout.variable(query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(
        q.contiguous(),
        k[index],
        v[index],
        queries,
        keys,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[None]
