"""The one place that knows a model family: its control tokens, its chat layout, its image grid, its box convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vt_trl.boxes import Sight
from vt_trl.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """What differs between vision-language models, as strings of their tokenizer and names of their configuration.

    ``control_tokens`` are never sampled (stop tokens apart) and never arise from text. ``boxes`` says in which frame
    the family writes coordinates: pixels of the shown image, or thousandths of its sides.
    """

    name: str
    model_types: tuple[str, ...]
    turn_start: str
    turn_end: str
    image_token: str
    vision_start: str
    vision_end: str
    control_tokens: tuple[str, ...]
    vision_module: str  # path of the vision tower inside the model
    default_system: str | None  # what the family's template says when a dialogue has no system message
    boxes: Literal["shown_pixels", "per_mille"]

    def sight(self, image_processor: Any) -> Sight:
        """How a model of this family sees pictures through its image processor."""
        size = image_processor.size
        return Sight(
            self.boxes,
            image_processor.patch_size * image_processor.merge_size,
            size["shortest_edge"],
            size["longest_edge"],
        )

    def control_ids(self, tokenizer: Any) -> dict[str, int]:
        """Id of each control token this tokenizer has. Raises ConfigError when one the layout needs is missing."""
        ids = {}
        for token in (self.turn_start, self.turn_end, *self.control_tokens):
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is not None and token_id != tokenizer.unk_token_id:
                ids[token] = token_id
        needed = (self.turn_start, self.turn_end, self.image_token, self.vision_start, self.vision_end)
        missing = [token for token in needed if token not in ids]
        if missing:
            raise ConfigError(
                f"The tokenizer has no {', '.join(missing)}, which the {self.name} chat layout needs. "
                f"Load the tokenizer that belongs to the model."
            )
        return ids

    def banned_ids(self, tokenizer: Any, vocab_size: int, stop_ids: set[int]) -> list[int]:
        """Ids a policy must not sample: control tokens that end no turn, and rows of the head without a token.

        Qwen pads its vocabulary to a multiple of 128; a padded id decodes to nothing and would be trained on blindly.
        """
        control = set(self.control_ids(tokenizer).values()) | set(range(len(tokenizer), vocab_size))
        return sorted(control - stop_ids)


_QWEN_CONTROL = (
    "<|endoftext|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _qwen(
    name: str,
    model_types: tuple[str, ...],
    boxes: Literal["shown_pixels", "per_mille"],
    default_system: str | None = None,
) -> Family:
    return Family(
        name=name,
        model_types=model_types,
        turn_start="<|im_start|>",
        turn_end="<|im_end|>",
        image_token="<|image_pad|>",
        vision_start="<|vision_start|>",
        vision_end="<|vision_end|>",
        control_tokens=_QWEN_CONTROL,
        vision_module="model.visual",
        default_system=default_system,
        boxes=boxes,
    )


FAMILIES = (
    _qwen("Qwen2.5-VL", ("qwen2_5_vl",), "shown_pixels", "You are a helpful assistant."),
    _qwen("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), "per_mille"),
)


def is_known(config: Any) -> bool:
    """Whether a configuration is that of a vision-language model of one of the families."""
    return any(getattr(config, "model_type", None) in family.model_types for family in FAMILIES)


def family_of(config: Any) -> Family:
    """The family of a model configuration. Raises ConfigError for a model type nobody has taught us."""
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(
        f"model_type {model_type!r} is not supported; supported: {known}. "
        f"Add a Family to vt_trl/families.py to teach the library a new one."
    )
