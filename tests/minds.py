"""A text-only model that knows nothing, for whoever asks a reasoner on this machine."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vt_trl.tiny import HEAD
from vt_trl.tiny_judge import judge_tokenizer


def make_mind(folder: Path) -> Path:
    """A Qwen3 of a few thousand random weights, with rows of its head that no token has."""
    tokenizer = judge_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
