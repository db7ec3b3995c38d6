"""What an estimate starts from, and what follows from it at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PretrainedConfig

from vt_trl.config import VTGRPOConfig
from vt_trl.envs import make_environment
from vt_trl.errors import ConfigError
from vt_trl.forward.attention import varlen_attn
from vt_trl.preflight.activations import Training
from vt_trl.preflight.counts import Counts, Widths, count, widths
from vt_trl.preflight.episodes import Episode, PixelLimits, Workload, longest_episode, typical_episodes
from vt_trl.preflight.flops import Machine
from vt_trl.preflight.launch import Launch
from vt_trl.preflight.micro import Branch, can_pack
from vt_trl.preflight.precision import Precision, precision
from vt_trl.preflight.states import States, states
from vt_trl.preflight.step import training_of
from vt_trl.recipe import RunArguments


@dataclass(frozen=True)
class Setup:
    """A run on paper. ``args`` must have been made for ``launch.processes`` processes. ``gpu_bytes``: memory of one
    GPU, or None when there is none. ``limits``: of the image processor. Raises ConfigError for a model whose layers
    the formulas do not describe."""

    run: RunArguments
    args: VTGRPOConfig
    config: PretrainedConfig
    launch: Launch
    gpu_bytes: int | None = None
    limits: PixelLimits = field(default_factory=PixelLimits)
    workload: Workload = field(default_factory=Workload)
    machine: Machine = field(default_factory=Machine)
    judge_config: PretrainedConfig | None = None
    given: frozenset[str] = frozenset()  # names of the settings the recipe and the command line set themselves

    def __post_init__(self) -> None:
        if getattr(self.config.get_text_config(), "num_experts", None):
            raise ConfigError(f"model_type {self.config.model_type!r} has experts; the preflight knows dense models.")

    @cached_property
    def counts(self) -> Counts:
        return count(self.config, self.run)

    @cached_property
    def widths(self) -> Widths:
        return widths(self.config)

    @cached_property
    def precision(self) -> Precision:
        return precision(self.run, self.args, self.launch)

    @cached_property
    def training(self) -> Training:
        run, counts = self.run, self.counts
        training = training_of(run, counts, self.args.gradient_checkpointing, run.attn_implementation)
        return training if self.tower_in_update else replace(training, vision_graph=False)

    @cached_property
    def states(self) -> States:
        adapter, quantized = self.run.lora != "none", self.run.quantize != "none"
        return states(self.counts, self.precision, self.launch, self.args, adapter, quantized)

    @cached_property
    def longest(self) -> Episode:
        return longest_episode(self.args, self.widths, self.limits)

    @cached_property
    def routes(self) -> list[tuple[float, Episode]]:
        """Shares and routes of the assumed workload; the last is the longest."""
        return typical_episodes(self.args, self.widths, self.limits, self.workload)

    @cached_property
    def padded(self) -> Episode:
        """What the rollouts of the assumed workload are padded to."""
        long = self.routes[-1][1]
        most = self.args.max_turn_tokens * max(1, long.turns)
        return replace(long, sampled=min(most, round(long.sampled * self.workload.tail)))

    def mean(self, number: str) -> float:
        """Mean of an :class:`Episode`'s number over the assumed workload."""
        return sum(share * getattr(episode, number) for share, episode in self.routes)

    @property
    def generated(self) -> int:
        """Rollouts one rank generates at a time."""
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    @property
    def groups(self) -> int:
        """Groups one rank generates at a time."""
        return max(1, self.generated // self.args.num_generations)

    @property
    def updates(self) -> float:
        """Optimizer steps one generation serves."""
        return self.args.steps_per_generation * self.args.num_iterations / self.args.gradient_accumulation_steps

    @property
    def old_pass(self) -> bool:
        """Whether old log-probabilities need a pass of their own (:mod:`vt_trl.passes`)."""
        engine = self.args.use_vllm and self.args.vllm_importance_sampling_correction
        every = self.args.steps_per_generation * self.args.num_iterations
        return engine or self.args.gradient_accumulation_steps % every != 0

    # What is computed once instead of many times (vt_trl/speed.py)

    @cached_property
    def packed(self) -> bool:
        """Whether micro-batches are packed, with shared prompts and without padding."""
        return self.args.share_prefix and can_pack(self.config, self.training.attention)

    @cached_property
    def gathers_keys(self) -> bool:
        """Whether a packed row's attention is one call of the kernel for variable lengths. Queries have the type of
        the residual stream, whose rotation makes them so."""
        return varlen_attn is not None and not self.args.use_cpu and self.precision.residual == 2

    @cached_property
    def same_replies(self) -> bool:
        return make_environment(self.args.environment, self.args.environment_args)().same_replies

    @property
    def frozen_towers(self) -> int:
        """Vision towers whose features are kept for a generation: the policy's, and that of a reference of its own."""
        divided = self.launch.sharding in ("zero3", "fsdp2")
        if not self.args.share_vision or divided:
            return 0
        return int(self._policy_tower_frozen) + (self.run.lora == "none" and self.args.beta != 0)

    @property
    def _policy_tower_frozen(self) -> bool:
        return self.run.lora == "language" or (self.run.lora == "none" and not self.run.train_vision)

    @property
    def tower_in_update(self) -> bool:
        """Whether pictures go through the policy's tower in a training step, too: not where it is frozen and a pass
        before the step has left their features."""
        kept = self._policy_tower_frozen and self.frozen_towers > 0
        seen = self.old_pass or (self.run.lora != "none" and self.args.beta != 0)
        return not (kept and seen)

    @cached_property
    def mean_branch(self) -> Branch:
        """What follows a prompt, on average over the assumed workload."""
        labelled = "loss_tokens" if self.args.loss_tokens_only else "completion"
        counts = [round(self.mean(name)) for name in ("completion", labelled, "reply_patches")]
        return Branch(*counts, self.mean("reply_images"))
