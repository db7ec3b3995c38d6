"""Settings of what is computed once instead of many times. All are exact; each can be switched off to measure it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vt_trl.errors import ConfigError


@dataclass(repr=False)
class SpeedSettings:
    """Part of :class:`vt_trl.config.VTGRPOConfig`. docs/performance.md says what each is worth."""

    share_images: bool = field(
        default=True, metadata={"help": "Preprocess each picture once and keep its pixels once per generation."}
    )
    share_vision: bool = field(
        default=True,
        metadata={"help": "Run the vision tower once per picture and micro-batch; once at all when it is frozen."},
    )
    share_prefix: bool = field(
        default=True, metadata={"help": "Compute the prompt of a group once per micro-batch, without padding."}
    )
    max_packed_tokens: int | None = field(
        default=None, metadata={"help": "With share_prefix: most tokens of one forward; a larger one is split."}
    )
    loss_tokens_only: bool = field(
        default=True, metadata={"help": "Apply the output head to sampled tokens only, not to what a tool said."}
    )
    balance_micro_batches: bool = field(
        default=True,
        metadata={"help": "Keep groups together and give micro-batches equally many tokens; off: TRL's shuffle."},
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={"help": "Leave rollouts without advantage out of the training pass where the loss has no KL term "
                  "and no entropy bonus."},
    )  # fmt: skip

    def check_speed(self) -> None:
        """Raises ConfigError for a number that cannot work."""
        if self.max_packed_tokens is not None and self.max_packed_tokens < 1:
            raise ConfigError(
                f"max_packed_tokens is {self.max_packed_tokens}; give a number of tokens, e.g. 32768, or leave it out."
            )
