"""What stays on the GPU: weights, gradients, optimizer states, the reference, and the rollouts of a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vt_trl.config import VTGRPOConfig
from vt_trl.preflight.counts import Counts
from vt_trl.preflight.episodes import Episode
from vt_trl.preflight.launch import Launch
from vt_trl.preflight.precision import Precision

if TYPE_CHECKING:
    from vt_trl.preflight.setup import Setup

# DeepSpeed's defaults, which accelerate leaves alone (deepspeed.ai/docs/config-json, "ZeRO optimization").
ZERO_BUCKET = 500_000_000  # reduce_bucket_size, numbers
ZERO_LIVE = 1_000_000_000  # stage3_max_live_parameters
ZERO_SUBGROUP = 1_000_000_000  # sub_group_size: weights whose gradients are fp32 at once during a step


@dataclass(frozen=True)
class States:
    """Bytes per rank. ``gathered``: whole weights that sharding brings back for a moment, in any pass;
    ``unsharded``: gradients kept whole between micro-batches; ``buckets``: copies for communication."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    gathered: int
    gathered_reference: int
    unsharded: int
    buckets: int
    optimizer_step: int  # for a moment, while the optimizer steps
    weight_sync: int  # for a moment, while weights are pushed to vLLM
    gradients_stay: bool  # also while rollouts are generated


# NF4 with double quantisation: half a byte, and per 64 weights a byte of scale, which has an fp32 scale per 256 itself
# (QLoRA, Dettmers et al. 2023, Section 3).
NF4 = 0.5 + (1 + 4 / 256) / 64


def states(
    counts: Counts, p: Precision, launch: Launch, args: VTGRPOConfig, adapter: bool, quantized: bool = False
) -> States:
    """Divide what a run holds over the processes of ``launch``.

    A second copy of the model is the reference when there is a KL term (``beta``) and no adapter to switch off. TRL
    shards it under ZeRO-3 and FSDP2, under FSDP2 as one unit that is gathered whole.
    """
    frozen = counts.total - counts.trained
    packed = counts.language_matrices if quantized else 0
    weights = (counts.trained * p.trained + (frozen - packed) * p.frozen + packed * NF4) / launch.weight_shards
    optimizer = counts.trained * p.state / launch.state_shards
    reference = counts.base * p.frozen if args.beta != 0 and not adapter else 0
    per_generation = args.steps_per_generation * args.num_iterations
    return States(
        weights=0 if launch.offload_weights else round(weights),
        gradients=round(counts.trained * p.gradient / launch.state_shards),
        optimizer=0 if launch.offload_optimizer else round(optimizer),
        reference=round(reference / launch.weight_shards),
        gathered=counts.layer * p.compute if packed else _gathered(counts, p, launch),  # a layer's weights, unpacked
        gathered_reference=round(reference) if launch.sharding == "fsdp2" else 0,
        unsharded=_unsharded(counts, p, launch, args),
        buckets=_buckets(counts, p, launch),
        optimizer_step=_optimizer_step(counts, launch),
        weight_sync=_weight_sync(counts, p, launch, adapter) if args.use_vllm else 0,
        gradients_stay=launch.sharding in ("zero2", "zero3") or per_generation < args.gradient_accumulation_steps,
    )


def _gathered(counts: Counts, p: Precision, launch: Launch) -> int:
    if launch.sharding == "zero3":
        return min(counts.total, ZERO_LIVE) * p.compute
    if launch.sharding != "fsdp2":
        return 0
    if not launch.reshard:
        return counts.total * p.compute
    # The layer at work and the next one; the head stays from forward to backward.
    return (2 * max(counts.layer, counts.vision_layer) + counts.largest) * p.compute


def _unsharded(counts: Counts, p: Precision, launch: Launch, args: VTGRPOConfig) -> int:
    """FSDP2 keeps whole gradients between micro-batches: accelerate's ``no_sync`` turns their reduction off, unless
    ``sync_each_batch`` is set."""
    if launch.sharding != "fsdp2":
        return 0
    if args.gradient_accumulation_steps > 1 and not syncs_each_batch(args):
        return counts.trained * p.compute
    return 2 * counts.layer * p.compute  # of the layer at work, and its copy for the reduction


def syncs_each_batch(args: VTGRPOConfig) -> bool:
    settings = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(settings.get("sync_each_batch"))


def _buckets(counts: Counts, p: Precision, launch: Launch) -> int:
    if launch.sharding in ("zero2", "zero3"):
        return min(ZERO_BUCKET, counts.trained) * p.gradient
    # DDP copies gradients into buckets: gradient_as_bucket_view is off.
    return counts.trained * p.gradient if launch.sharding == "none" and launch.processes > 1 else 0


def _optimizer_step(counts: Counts, launch: Launch) -> int:
    """DeepSpeed converts the gradients of a sub-group, ZeRO-2 those of the rank, to fp32."""
    if launch.sharding not in ("zero2", "zero3") or launch.offload_optimizer:
        return 0
    own = counts.trained // launch.processes
    return 4 * (min(own, ZERO_SUBGROUP) if launch.sharding == "zero3" else own)


def _weight_sync(counts: Counts, p: Precision, launch: Launch, adapter: bool) -> int:
    """The largest tensor, gathered and cloned; with an adapter ZeRO-3 gathers the whole model to merge it."""
    if launch.sharding == "zero3":
        return (counts.total if adapter else counts.largest) * p.trained + counts.largest * p.trained
    if launch.sharding == "fsdp2":
        return 2 * counts.largest * p.trained
    return counts.largest * p.frozen if adapter else 0


@dataclass(frozen=True)
class Rollouts:
    """Bytes of one generation batch on one rank, from packing to the last micro-batch that is trained on it.

    ``features``: what frozen towers made of its pictures, from the first pass to the end of the last update.
    """

    tokens: int
    pixels: int
    features: int = 0

    @property
    def total(self) -> int:
        """What stays until the next generation replaces it; its features do not."""
        return self.tokens + self.pixels


def rollouts(setup: Setup, episode: Episode, patches: float) -> Rollouts:
    """A rank's rollouts of one generation, padded to ``episode``, with ``patches`` each on average.

    Per padded position: ids and attention mask of 8 bytes each; on the completion's side also the loss mask of 8, and
    4 each for sampled, old and reference log-probabilities and the importance ratio. Patches are fp32. With
    ``share_images`` each picture is held once: those of a prompt per group, and those of a tool as well where a whole
    group is shown the same (some member of every group is taken to ask); otherwise every rollout holds its own.
    """
    args = setup.args
    engine = args.use_vllm and args.vllm_importance_sampling_correction
    completion = 24 + 4 * (1 + setup.old_pass + (args.beta != 0) + engine)
    tokens = setup.generated * (16 * episode.prompt + completion * episode.completion)
    held = setup.generated * patches
    if args.share_images and setup.same_replies:
        held = setup.groups * episode.patches
    elif args.share_images:
        held += (setup.groups - setup.generated) * episode.prompt_patches
    w = setup.widths
    features = setup.frozen_towers * held / w.merge**2 * w.hidden * w.mergers * setup.precision.compute
    return Rollouts(tokens, round(held * w.patch * 4), round(features))
