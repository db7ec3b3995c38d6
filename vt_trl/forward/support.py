"""Which models and settings the packed forward is exact for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from vt_trl.trainer import VTGRPOTrainer

TESTED = ("qwen2_5_vl", "qwen3_vl")


def why_not_packed(trainer: VTGRPOTrainer) -> str | None:
    """Why prompts cannot be shared in this run's forward, as half a sentence; None when they can."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if getattr(policy, "active_peft_config", None) is not None and policy.active_peft_config.is_prompt_learning:
        return "prompt learning puts tokens of its own before every sample"
    whole = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    kind, text = whole.config.model_type, whole.config.get_text_config()
    if kind not in TESTED:
        return f"a model of type {kind} has not been tested with it ({', '.join(TESTED)} have)"
    implementation = text._attn_implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        return f"attn_implementation is {implementation}, which cannot be told of shared prompts; use sdpa"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "some layers of the model look at a sliding window only"
    if getattr(text, "attention_dropout", 0.0) and not trainer.args.disable_dropout:
        return f"attention_dropout is {text.attention_dropout}; set disable_dropout: true"
    return None
