"""What an estimate starts from, and what follows from it at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PretrainedConfig

from vt_trl.config import VTGRPOConfig
from vt_trl.errors import ConfigError
from vt_trl.preflight.activations import MicroBatch, Training
from vt_trl.preflight.counts import Counts, Widths, count, widths
from vt_trl.preflight.episodes import Episode, PixelLimits, Workload, longest_episode, typical_episodes
from vt_trl.preflight.flops import Machine
from vt_trl.preflight.launch import Launch
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
        return training_of(self.run, self.counts, self.args.gradient_checkpointing, self.run.attn_implementation)

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
    def updates(self) -> float:
        """Optimizer steps one generation serves."""
        return self.args.steps_per_generation * self.args.num_iterations / self.args.gradient_accumulation_steps

    @property
    def old_pass(self) -> bool:
        """Whether old log-probabilities need a pass of their own (:mod:`vt_trl.passes`)."""
        engine = self.args.use_vllm and self.args.vllm_importance_sampling_correction
        every = self.args.steps_per_generation * self.args.num_iterations
        return engine or self.args.gradient_accumulation_steps % every != 0

    def micro_batch(self, episode: Episode) -> MicroBatch:
        """One micro-batch of rollouts as long as ``episode``; the fused head sees the whole completion."""
        samples = self.args.per_device_train_batch_size
        return MicroBatch(
            samples,
            episode.tokens,
            samples * episode.completion,
            samples * episode.patches,
            samples * episode.images,
        )
