"""What vt_trl uses of TRL that is not TRL's public interface. A failure says which seam moved and who stands on it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import trl
from packaging.version import Version

GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
ENGINE = "trl.generation.vllm_generation:VLLMGeneration"
UTILS = "trl.trainer.utils"

# seam: (its parameters in TRL 1.16, the vt_trl modules that would break)
SIGNATURES = {
    f"{GRPO}._generate_and_score_completions": ("self, inputs", "trainer.py, which overrides it"),
    f"{GRPO}._get_per_token_logps_and_entropies": (
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, "
        "compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, pixel_attention_mask=None, "
        "spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, mm_token_type_ids=None, "
        "image_position_ids=None",
        "update.py, which overrides it for the loss",
    ),
    f"{GRPO}._prepare_inputs": ("self, generation_batch", "update.py, which overrides it"),
    f"{GRPO}._calculate_rewards": (
        "self, inputs, prompts, completions, completion_ids_list",
        "trainer.py, which calls it",
    ),
    f"{GRPO}._compute_loss": ("self, model, inputs", "packing.py and passes.py, which fill its inputs"),
    "trl.trainer.utils:_use_triton": ("device", "fused_head.py, which replaces it during a forward"),
    f"{GRPO}.log": ("self, logs, start_time=None", "trainer.py, which extends it"),
    f"{ENGINE}._init_vllm": ("self", "generation/vllm_engine.py, which overrides it"),
    f"{ENGINE}._iter_named_params": ("self", "generation/vllm_engine.py, which calls it"),
    f"{ENGINE}.__init__": (
        "self, model, accelerator, processing_class, mode='colocate', structured_outputs_regex=None, "
        "server_base_url=None, server_host='0.0.0.0', server_port=8000, server_timeout=240.0, group_port=51216, "
        "tensor_parallel_size=1, gpu_memory_utilization=0.9, max_model_length=None, max_num_seqs=None, "
        "enable_sleep_mode=False, model_impl='auto', trust_remote_code=False, repetition_penalty=1.0, "
        "temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_completion_length=16, logprobs=0, generation_kwargs=None",
        "generation/vllm_engine.py and trainer.py, which build it",
    ),
    "trl.generation.vllm_generation:empty_cache": ("", "generation/vllm_engine.py"),
    "trl.models:unwrap_model_for_generation": (
        "model, accelerator, gather_deepspeed3_params=True, generation_kwargs=None, "
        "gradient_checkpointing_kwargs=None",
        "trainer.py",
    ),
    "trl.models.utils:disable_gradient_checkpointing": ("model, gradient_checkpointing_kwargs=None", "passes.py"),
    f"{UTILS}:pad": ("tensors, padding_value=0, padding_side='right', pad_to_multiple_of=None", "packing.py"),
    f"{UTILS}:use_adapter": ("model, adapter_name", "passes.py"),
    f"{UTILS}:ensure_master_addr_port": ("addr=None, port=None", "generation/vllm_engine.py"),
    f"{UTILS}:add_fused_lm_head": (
        "model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',)",
        "token_ban.py, whose bias has to reach it",
    ),
}

READ_BY_LOSS = {  # what `_compute_loss` takes out of its inputs, and which of it we never have
    "rows": {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch"},
    "scores": {"advantages", "old_per_token_logps", "ref_per_token_logps"},
    "vLLM": {"sampling_per_token_logps", "importance_sampling_ratio"},
    "pictures": {"pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids"},
    "other families": {
        *("pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids"),
        "image_position_ids",
    },
}


def find(seam: str) -> Callable[..., Any]:
    module, _, path = seam.partition(":")
    thing: Any = importlib.import_module(module)
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def parameters(function: Callable[..., Any]) -> str:
    """Names and defaults, without annotations: ``a, b=1``."""
    known = inspect.signature(function).parameters.values()
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in known)


def moved(seam: str, before: object, now: object, user: str) -> str:
    return f"TRL {trl.__version__} changed a seam.\n  {seam}\n  from: {before}\n  to:   {now}\n  used by vt_trl/{user}"


def test_the_installed_trl_is_the_one_the_seams_were_read_in():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        f"TRL {trl.__version__} is installed; vt_trl stands on private parts of 1.16 (pyproject.toml pins trl<1.17)."
    )


@pytest.mark.parametrize("seam", SIGNATURES)
def test_signature(seam):
    expected, user = SIGNATURES[seam]
    try:
        now = parameters(find(seam))
    except (ImportError, AttributeError) as error:
        pytest.fail(moved(seam, f"({expected})", f"gone ({error})", user))
    assert now == expected, moved(seam, f"({expected})", f"({now})", user)


def test_the_loss_reads_what_packing_and_passes_give():
    seam = f"{GRPO}._compute_loss"
    source = inspect.getsource(find(seam))
    now = set(re.findall(r"""\binputs(?:\.get\(|\[)\s*["'](\w+)["']""", source))
    before = set().union(*READ_BY_LOSS.values())
    change = f"new: {sorted(now - before) or 'none'}, no longer read: {sorted(before - now) or 'none'}"
    assert now == before, moved(f"{seam}, keys of inputs", sorted(before), change, "packing.py and passes.py")
    assert 'completion_mask * inputs["tool_mask"]' in source, moved(
        f"{seam}, the loss mask", "completion_mask * tool_mask", "something else", "packing.py (tool_mask)"
    )


def test_the_fused_head_reads_the_bias_that_bans_tokens():
    seam = f"{UTILS}:add_fused_lm_head"
    source = inspect.getsource(find(seam))
    assert "lm_head.bias" in source, moved(seam, "reads lm_head.bias", "does not", "token_ban.py")


def test_one_generation_serves_the_steps_that_the_old_logprobs_are_kept_for():
    seam = f"{GRPO}._prepare_inputs"
    source = inspect.getsource(find(seam))
    rule = "self.args.steps_per_generation * self.num_iterations"
    assert rule in source, moved(
        seam, f"generates every {rule} steps", "some other rule", "update.py and passes.py (generate_every)"
    )


@pytest.mark.parametrize("name", ["_dist", "_llm_weights_sleeping"])
def test_fields_of_the_engine(name):
    source = inspect.getsource(find(ENGINE))
    assert re.search(rf"\bself\.{name}\b\s*=", source), moved(
        f"{ENGINE}.{name}", "a field", "gone", "generation/vllm_engine.py"
    )


@pytest.mark.parametrize(
    "name",
    ["_tokenizer", "_dist", "eos_token_ids", "reward_func_names", "reward_weights", "num_generations_eval",
     "scale_rewards", "mask_truncated_completions", "pad_to_multiple_of", "use_vllm", "_logs", "ref_model"],
)  # fmt: skip
def test_fields_of_the_trainer(name):
    source = inspect.getsource(find(GRPO))
    assert re.search(rf"\bself\.{name}\b\s*(?::[^=\n]+)?=", source), moved(
        f"{GRPO}.{name}", "a field set in __init__", "gone", "trainer.py"
    )


def test_a_change_would_be_told_in_words():
    text = moved("a:b", "(x)", "(x, y)", "trainer.py")
    assert "a:b" in text and "from: (x)" in text and "to:   (x, y)" in text and "vt_trl/trainer.py" in text
