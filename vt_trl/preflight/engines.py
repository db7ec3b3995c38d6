"""Memory of generation and of a local judge: vLLM's share of the GPU, or a forward with a cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from transformers import AutoConfig, PretrainedConfig

from vt_trl.config import VTGRPOConfig
from vt_trl.judges import CascadeJudge, LocalJudge, make_judge
from vt_trl.preflight.activations import MicroBatch, Training, forward_layer, forward_vision
from vt_trl.preflight.counts import Widths
from vt_trl.preflight.episodes import Episode
from vt_trl.preflight.precision import Precision
from vt_trl.preflight.setup import Setup

GIB = 1 << 30

# Assumptions, not measurements. A sleeping engine still has its process's CUDA graphs and handles.
ENGINE_ASLEEP = GIB
JUDGE_PROCESS = GIB // 2  # CUDA context of the judge's process, asleep or not
JUDGE_CASE = 1024  # tokens of a long case: rubric, question, accepted answers, prediction


@dataclass(frozen=True)
class Generation:
    """Bytes that generation needs on top of what stays: ``awake`` while it runs, ``asleep`` in the other phases.

    ``cache``: tokens the key-value cache holds; ``context``: tokens of the longest context; ``at_least``: bytes with
    which vLLM can hold one such context.
    """

    awake: int
    asleep: int
    weights: int
    working: int
    cache_bytes: int
    cache: int
    context: int
    at_least: int


def generation(setup: Setup, episode: Episode) -> Generation:
    """Generation for episodes as long as ``episode``."""
    if setup.args.use_vllm and setup.args.vllm_mode == "server":
        return Generation(0, 0, 0, 0, 0, 0, episode.tokens, 0)  # on other GPUs
    if setup.args.use_vllm:
        return _vllm(setup, episode)
    w, p, args = setup.widths, setup.precision, setup.args
    chunk = min(args.generation_chunk, setup.generated)
    cache = chunk * episode.tokens * w.keys_and_values * p.frozen
    batch = MicroBatch(chunk, episode.prompt, 0, chunk * episode.patches, chunk * episode.images)
    plain = Training(language=False, vision=False, attention=setup.training.attention)
    working = max(forward_layer(w, batch, p, plain), forward_vision(w, batch, p)) + 8 * chunk * w.vocabulary
    working += batch.patches * w.patch * 4
    whole = setup.counts.total * p.compute if setup.launch.weight_shards > 1 else 0
    total = whole + working + cache
    return Generation(total, 0, whole, working, cache, chunk * episode.tokens, episode.tokens, 0)


def _vllm(setup: Setup, episode: Episode) -> Generation:
    """vLLM takes its share of the whole GPU: weights, room for its largest batch, and the cache in what is left."""
    args, w, p = setup.args, setup.widths, setup.precision
    shared = args.vllm_tensor_parallel_size  # processes per engine, each with a part of its weights and heads
    weights = setup.counts.base * p.compute // shared  # adapters are merged
    per_token = max(1, w.keys_and_values * p.compute // shared)
    context = min(episode.tokens, args.vllm_max_model_length or episode.tokens)
    working = _vllm_working(w, p, episode, setup.generated * shared)
    share = None if setup.gpu_bytes is None else round(args.vllm_gpu_memory_utilization * setup.gpu_bytes)
    if args.use_cpu:  # vLLM's CPU build: VLLM_CPU_KVCACHE_SPACE, in GiB, default 4
        share = None
        cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 4) * GIB
    elif share is None:
        cache = min(setup.generated, 8) * context * per_token
    else:
        cache = max(0, share - weights - working)
    awake = weights + working + cache if share is None else share
    asleep = ENGINE_ASLEEP if args.vllm_enable_sleep_mode else awake
    at_least = weights + working + context * per_token
    return Generation(awake, asleep, weights, working, cache, cache // per_token, context, at_least)


def _vllm_working(w: Widths, p: Precision, episode: Episode, sequences: int) -> int:
    """What vLLM's profiling run reserves: its largest batch through a layer, one largest picture through the tower,
    and fp32 logits of every sequence with two copies of the sampler's. A rough figure: it only moves the cache."""
    visual = max(episode.prompt_visual, episode.reply_visual)
    batch = max(4096, visual, sequences)
    layer = batch * p.compute * (3 * w.intermediate + 4 * w.hidden)
    tower = visual * w.merge**2 * (30 * w.vision_hidden + p.compute * w.vision_intermediate)
    logits = 3 * 4 * sequences * w.vocabulary
    return max(layer, tower) + logits


@dataclass(frozen=True)
class JudgeMemory:
    """Bytes of a local judge: always there, and on top of that while it judges. ``note`` says what is not known."""

    always: int = 0
    judging: int = 0
    note: str | None = None


def judge_memory(
    args: VTGRPOConfig, gpu_bytes: int | None, judge_config: PretrainedConfig | None = None
) -> JudgeMemory:
    """A local judge in vLLM takes its share of the GPU while it judges and leaves it asleep; with transformers its
    weights stay, at 2 bytes each. A remote judge and a rule need nothing."""
    judge = make_judge(args.judge, args.judge_args) if args.judge else None
    judge = judge.second if isinstance(judge, CascadeJudge) else judge
    if not isinstance(judge, LocalJudge) or (args.use_cpu or judge.device.startswith("cpu")):
        return JudgeMemory()
    vllm = judge.backend == "vllm" or (judge.backend == "auto" and args.use_vllm)
    if vllm and gpu_bytes is not None:
        return JudgeMemory(JUDGE_PROCESS, round(judge.gpu_memory_utilization * gpu_bytes))
    config = judge_config or _configuration(judge.model)
    if config is None:
        return JudgeMemory(note=f"The judge {judge.model} is not at hand, so its memory is not counted.")
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_key_value_heads)
    ends = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    weights = 2 * (layers * (attention + 3 * hidden * config.intermediate_size) + ends)
    tokens = judge.batch_size * min(judge.max_tokens, JUDGE_CASE)
    return JudgeMemory(weights, tokens * 2 * (3 * config.intermediate_size + 4 * hidden))


@lru_cache(maxsize=8)  # advice estimates many times
def _configuration(model: str) -> PretrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None
