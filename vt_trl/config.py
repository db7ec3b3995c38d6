"""Settings of a run, and every check on them: TRL's GRPO settings, and what a multi-turn run adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from vt_trl.alarm import ACTIONS, check_bands
from vt_trl.envs import make_environment
from vt_trl.errors import ConfigError, did_you_mean
from vt_trl.rewards import PENALTIES, PRESETS, make_rewards
from vt_trl.speed import SpeedSettings

# Settings of stock TRL that this trainer would ignore; accepting them silently would be a lie.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "use_transformers_continuous_batching": (False, "it cannot take images; set use_vllm: true instead"),
    "vllm_structured_outputs_regex": (None, "turns are free text that the environment parses"),
    "multi_objective_aggregation": ("sum_then_normalize", "the penalty is defined on summed rewards"),
    "max_tool_calling_iterations": (None, "the environment sets the number of turns"),
    "chat_template_kwargs": (None, "dialogues are laid out by the model family, not by a chat template"),
    "generation_kwargs": (None, "use temperature, top_p, top_k, min_p and repetition_penalty"),
}

_CHOICES = {
    "dynamic_sampling": ("off", "drop", "refill"),
    "dynamic_sampling_surplus": ("keep", "drop"),
    "dynamic_sampling_shortfall": ("fewer", "stop"),
    "alarm_action": ACTIONS,
    "penalty_on": ("call", "visual_tokens"),
}


@dataclass(repr=False)
class VTGRPOConfig(SpeedSettings, GRPOConfig):
    """GRPO settings of TRL plus environment, rewards, penalty, and what is computed once (SpeedSettings).

    A mapping can be written as YAML in a recipe or as JSON on the command line. Raises ConfigError that says which
    number to change.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["environment_args", "judge_args", "alarm_bands"]

    environment: str = field(
        default="resize",
        metadata={"help": "Environment: `resize`, `direct`, `single`, `zoom`, `look`, or `module:Class` of your own."},
    )
    environment_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the environment, e.g. `{max_pixels: 4194304}`."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={"help": "Reward functions by name or `module:function`; weighed by `reward_weights`."},
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward; default 1.0 for accuracy, 0.5 for format, 1.0 others."}
    )
    reward_preset: str | None = field(
        default=None,
        metadata={"help": f"Sets rewards and reward_weights as published: {', '.join(PRESETS)}; see PRESETS."},
    )
    correctness_reward: str = field(
        default="accuracy",
        metadata={"help": "The reward that says whether an answer is right (score > 0.5); the penalty counts it."},
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who decides `accuracy`: openai, local, rule, cascade or `module:Class`; by default a rule that "
            "always decides."
        },
    )
    judge_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the judge, e.g. `{model: gpt-4o, concurrency: 64}`; never a key."}
    )
    judge_cache: bool = field(default=True, metadata={"help": "Keep verdicts on disk for this and other runs."})
    judge_cache_dir: str | None = field(
        default=None, metadata={"help": "Where verdicts are kept; default ~/.cache/vt_trl/judge."}
    )
    judge_max_failed: float = field(
        default=0.1, metadata={"help": "Share of failed verdicts above which the run stops with the judge's error."}
    )
    judge_lenient: bool = field(
        default=False, metadata={"help": "Judge a reply without answer tags as a whole instead of calling it wrong."}
    )
    penalty: str = field(
        default="paper",
        metadata={"help": f"Group penalty on asking for the full image: {', '.join(PENALTIES)}."},
    )
    penalty_on: str = field(
        default="call",
        metadata={"help": "What a request pays for: the call, or its visual_tokens as a share of the group's most."},
    )
    penalty_theta: float = field(default=0.2, metadata={"help": "Threshold theta on the direct share (paper: 0.2)."})
    penalty_amount: float = field(default=0.1, metadata={"help": "Size of the penalty (paper: 0.1)."})
    dynamic_sampling: str = field(
        default="off",
        metadata={"help": "Groups that teach nothing stay (off), carry no loss (drop) or are replaced (refill)."},
    )
    dynamic_sampling_rounds: int = field(
        default=4, metadata={"help": "Refill: rounds of generation per batch after the first, at most."}
    )
    dynamic_sampling_surplus: str = field(
        default="keep",
        metadata={
            "help": "Refill: good groups too many wait for the next batch of the same weights "
            "(keep) or are left out (drop)."
        },
    )
    dynamic_sampling_shortfall: str = field(
        default="fewer", metadata={"help": "Refill, at the limit: go on with fewer groups, or stop."}
    )
    alarm_action: str = field(
        default="warn",
        metadata={"help": "When a figure stays outside its band: off, warn, stop, or theta (moves penalty_theta)."},
    )
    alarm_bands: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Bands by figure; default request_rate 0.02-0.98, accuracy 0.02-, entropy 0.005-."},
    )
    alarm_patience: int = field(default=20, metadata={"help": "Logs in a row outside a band until the alarm acts."})
    alarm_theta_step: float = field(default=0.02, metadata={"help": "alarm_action: theta moves it by this much."})
    max_turn_tokens: int | None = field(
        default=None, metadata={"help": "Sampled tokens per turn at most; default max_completion_length."}
    )
    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Give episodes with a truncated turn no loss: they are cut, not wrong."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Sampled and trained log-probabilities agree only without dropout."}
    )
    eval_greedy: bool = field(default=True, metadata={"help": "Evaluate greedily in every turn, one rollout per row."})
    log_completions_rollouts: int = field(
        default=64,
        metadata={"help": "log_completions: rollouts kept per logged step at most, whole groups of all processes."},
    )
    log_completions_pixels: int | None = field(
        default=1_048_576,
        metadata={"help": "log_completions: larger pictures are shrunk to this area; null: as the model saw them."},
    )
    generation_chunk: int = field(
        default=64, metadata={"help": "Sequences per generate call of the transformers backend; bounds its memory."}
    )

    __repr__ = GRPOConfig.__str__  # which masks hub_token; the one of a dataclass prints it

    def __post_init__(self) -> None:
        if self.eval_greedy and self.num_generations_eval is None:
            self.num_generations_eval = 1
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu  # bf16 on a CPU is slow, and exactness is what CPU runs are for
        try:
            super().__post_init__()
        except ValueError:  # torn groups are what stock TRL refuses most often, without the number to change
            self._check_whole_groups()
            raise
        self._check_unsupported()
        self._apply_preset()
        self._check_episode()
        self._check_course()
        self.check_speed()
        self._check_judge()
        self._check_rewards()
        self._check_whole_groups()
        self._check_eval_groups()

    def _check_unsupported(self) -> None:
        for name, (default, why) in _UNSUPPORTED.items():
            value = getattr(self, name, default)
            if value not in (default, {}):
                raise ConfigError(f"{name} is set to {value!r}, which has no effect here: {why}. Remove it.")
        if self.remove_unused_columns:
            raise ConfigError("remove_unused_columns is true, which would drop the answers; remove it.")
        truncation = {"top_p": 1.0, "top_k": 0, "min_p": None}
        cut = [name for name, off in truncation.items() if getattr(self, name) != off]
        if cut and self.use_vllm and self.vllm_importance_sampling_correction:
            raise ConfigError(
                f"{', '.join(cut)} is set: vLLM then reports probabilities after truncation, the trainer's forward "
                f"knows none, and the importance ratio between them is wrong. Remove it, or set "
                f"vllm_importance_sampling_correction: false."
            )
        idle = {"vllm_tensor_parallel_size": 1, "vllm_enable_sleep_mode": False}
        for name, default in idle.items():
            if self.vllm_mode == "server" and getattr(self, name) != default:
                raise ConfigError(
                    f"{name} is {getattr(self, name)} and vllm_mode is server: the server's own command line sets how "
                    f"its GPUs are used. Remove it here."
                )
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.temperature}: a group of equal rollouts teaches nothing. Set it above 0 "
                f"(the paper: 1.0); evaluation is greedy by eval_greedy."
            )

    def _check_episode(self) -> None:
        if self.max_completion_length is None or self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}; it must be 1 or more.")
        self.max_turn_tokens = self.max_turn_tokens or self.max_completion_length
        if not 1 <= self.max_turn_tokens <= self.max_completion_length:
            raise ConfigError(
                f"max_turn_tokens is {self.max_turn_tokens} and max_completion_length, which bounds all turns with "
                f"tool text and images, is {self.max_completion_length}; lower the first or raise the second."
            )
        if self.generation_chunk < 1:
            raise ConfigError(f"generation_chunk is {self.generation_chunk}; it must be 1 or more.")
        for name in ("log_completions_rollouts", "log_completions_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more (log_completions: false).")
        if not isinstance(self.environment_args or {}, dict):
            raise ConfigError(
                f"environment_args is {self.environment_args!r}; write a mapping, e.g. `{{max_pixels: 4194304}}` in a "
                f"recipe or '{{\"max_pixels\": 4194304}}' on the command line."
            )
        make_environment(self.environment, self.environment_args)

    def _check_course(self) -> None:
        if self.dynamic_sampling is False:  # YAML reads off as a truth value
            self.dynamic_sampling = "off"
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                hint = did_you_mean(getattr(self, name), allowed)
                raise ConfigError(f"{name} is {getattr(self, name)!r}.{hint} Use {' or '.join(allowed)}.")
        check_bands(self.alarm_bands)
        if self.alarm_patience < 1:
            raise ConfigError(f"alarm_patience is {self.alarm_patience}; it must be 1 or more.")
        if self.dynamic_sampling_rounds < 1:
            raise ConfigError(f"dynamic_sampling_rounds is {self.dynamic_sampling_rounds}; it must be 1 or more.")
        if self.dynamic_sampling != "off" and self.num_generations < 2:
            raise ConfigError(
                f"dynamic_sampling is {self.dynamic_sampling}, but num_generations is {self.num_generations}: a group "
                f"of one never has a spread. Raise num_generations, or set dynamic_sampling: off."
            )

    def _check_judge(self) -> None:
        if not isinstance(self.judge_args or {}, dict):
            raise ConfigError(
                f"judge_args is {self.judge_args!r}; write a mapping, e.g. `{{model: gpt-4o}}` in a recipe or "
                f'\'{{"model": "gpt-4o"}}\' on the command line.'
            )
        if self.judge is None and self.judge_args:
            raise ConfigError(f"judge_args is {self.judge_args!r}, but no judge is set; set judge, or remove it.")
        if self.judge is not None and "accuracy" not in self.rewards:
            raise ConfigError(
                f"judge is {self.judge!r}, but rewards are {self.rewards}: add accuracy, which it decides."
            )
        make_rewards(self)

    def _apply_preset(self) -> None:
        if self.reward_preset is None:
            return
        if self.reward_preset not in PRESETS:
            hint = did_you_mean(self.reward_preset, PRESETS)
            raise ConfigError(f"reward_preset is {self.reward_preset!r}.{hint} Use {', '.join(PRESETS)}.")
        preset = PRESETS[self.reward_preset]
        names, weights = list(preset), list(preset.values())
        if self.rewards not in (["accuracy", "format"], names) or self.reward_weights not in (None, weights):
            raise ConfigError(
                f"reward_preset is {self.reward_preset}, which sets rewards {names} and reward_weights {weights}, and "
                f"they are set, too. Remove reward_preset, or them."
            )
        if self.penalty != "none" and self.penalty_on == "call":
            raise ConfigError(
                f"reward_preset is {self.reward_preset}, whose paper has no such penalty, and penalty is "
                f"{self.penalty}, which fines every call. Set penalty: none, or penalty_on: visual_tokens."
            )
        self.rewards, self.reward_weights = names, weights

    def _check_rewards(self) -> None:
        if self.correctness_reward not in self.rewards:
            raise ConfigError(
                f"correctness_reward is {self.correctness_reward!r}, but rewards are {self.rewards}; name one of them."
            )
        if self.reward_weights is None:
            self.reward_weights = [0.5 if name == "format" else 1.0 for name in self.rewards]
        if len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards "
                f"({', '.join(self.rewards)}); give one each."
            )
        if self.penalty not in PENALTIES:
            hint = did_you_mean(self.penalty, PENALTIES)
            raise ConfigError(f"penalty is {self.penalty!r}.{hint} Use one of {', '.join(PENALTIES)}.")
        if not 0 <= self.penalty_theta <= 1:
            raise ConfigError(f"penalty_theta is {self.penalty_theta}; it is a share, from 0 to 1 (the paper: 0.2).")
        if self.penalty_amount < 0:
            raise ConfigError(f"penalty_amount is {self.penalty_amount}; it is taken away, so it must be 0 or more.")

    def _check_whole_groups(self) -> None:
        """Whole groups on one process: penalty and advantage need all members of a group side by side."""
        local = self.per_device_train_batch_size * (self.steps_per_generation or 0)
        if local % self.num_generations:
            steps = self.num_generations // math.gcd(self.num_generations, self.per_device_train_batch_size)
            batch = steps * self.per_device_train_batch_size * self.world_size
            raise ConfigError(
                f"A process generates per_device_train_batch_size ({self.per_device_train_batch_size}) x "
                f"steps_per_generation ({self.steps_per_generation}) = {local} rollouts at a time, which is not a "
                f"multiple of num_generations ({self.num_generations}); groups would be torn between processes. "
                f"Set steps_per_generation (or gradient_accumulation_steps) to a multiple of {steps}, or "
                f"generation_batch_size to a multiple of {batch}."
            )

    def _check_eval_groups(self) -> None:
        if self.eval_greedy and self.num_generations_eval != 1:
            raise ConfigError(
                f"num_generations_eval is {self.num_generations_eval}, but greedy rollouts of one row are all equal; "
                f"set it to 1, or set eval_greedy: false."
            )
        if self.per_device_eval_batch_size % self.num_generations_eval:
            raise ConfigError(
                f"per_device_eval_batch_size ({self.per_device_eval_batch_size}) must be a multiple of "
                f"num_generations_eval ({self.num_generations_eval})."
            )
