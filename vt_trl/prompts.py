"""The texts a policy reads: tool signature, task, tool replies. Every one can be replaced from a recipe.

The frame around the tool signature is the Hermes layout the Qwen models were trained on (their template of before
April 2025 wrote it; the published one of Qwen2.5-VL no longer does, so it is rendered here). The wording is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from vt_trl.errors import ConfigError
from vt_trl.types import Fault

RESIZE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "resize_image",
        "description": "Shows the image again at its full resolution.",
        "parameters": {
            "type": "object",
            "properties": {
                "action": {
                    "type": "string",
                    "enum": ["resize"],
                    "description": "`resize` doubles both sides of the image shown so far.",
                }
            },
            "required": ["action"],
        },
    },
}


def hermes_system(tools: list[dict[str, Any]], preamble: str = "You are a helpful assistant.") -> str:
    """A system text that declares ``tools`` in the Hermes layout of Qwen's tool-calling templates."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"{preamble}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{signatures}\n</tools>"
        "\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


CALL_FAULTS = {
    Fault.BAD_JSON: "Between the tool_call tags stands no JSON object with exactly the keys name and arguments.",
    Fault.WRONG_TOOL: "There is no tool of that name; the only one is resize_image.",
    Fault.WRONG_ARGUMENTS: 'The arguments do not fit; resize_image takes {"action": "resize"} and nothing else.',
    Fault.SEVERAL_CALLS: "Only one tool call is possible per turn, and several were made.",
    Fault.CALL_AND_ANSWER: "A turn holds either an answer or a tool call, and this one held both.",
    Fault.DOUBLED_TAGS: "The tool_call tags are doubled.",
    Fault.BROKEN_TAGS: "A tag is not closed, not opened, or out of order.",
}


@dataclass(frozen=True)
class Prompts:
    """The texts of an episode. ``{question}`` in ``task`` is replaced by the row's question, nothing else is."""

    system: str = field(default_factory=lambda: hermes_system([RESIZE_TOOL]))
    task: str = (
        "{question}\n\n"
        "The image above is shown at reduced resolution. First reason inside <think> </think>. Then do one of two "
        "things: if what you see is enough, give the final answer inside <answer> </answer>; if details that matter "
        "cannot be made out, call resize_image inside <tool_call> </tool_call> to see the image at full resolution. "
        "Calling costs time, so call only when it helps. For mathematics and multiple choice put the value or the "
        "letter into \\boxed{} inside the answer."
    )
    before_image: str = "<tool_response>\nThe image at full resolution:\n"
    after_image: str = (
        "\n</tool_response>\nContinue: reason inside <think> </think> and answer inside <answer> </answer>."
    )
    call_refused: str = (
        "<tool_response>\nThe call was not carried out. {reason}\n</tool_response>\n"
        "Reason inside <think> </think> and answer inside <answer> </answer> from what you have seen."
    )

    reasons: ClassVar[Mapping[Fault, str]] = CALL_FAULTS  # what a refusal says of a fault

    @classmethod
    def from_settings(cls, settings: Mapping[str, str] | None, base: Prompts | None = None) -> Self:
        """Prompts with some texts replaced. Raises ConfigError for an unknown name or a text without its slot."""
        known = [f.name for f in fields(cls)]
        for name, text in (settings or {}).items():
            if name not in known:
                raise ConfigError(f"prompts: there is no text {name!r}; there are {', '.join(known)}.")
            if not isinstance(text, str):
                raise ConfigError(f"prompts.{name} must be a text, not {type(text).__name__}; put it in quotes.")
        base = base or cls()
        prompts = cls(**{name: getattr(base, name) for name in known} | dict(settings or {}))
        for name, slot in (("task", "{question}"), ("call_refused", "{reason}")):
            if slot not in getattr(prompts, name):
                raise ConfigError(f"prompts.{name} has no {slot}, so the policy would never read it; add it.")
        return prompts

    def question(self, question: str) -> str:
        return self.task.replace("{question}", question)

    def refusal(self, faults: tuple[Fault, ...]) -> str:
        """The tool reply for a call that cannot be run; fixed sentences only, nothing the policy wrote is echoed."""
        reasons = [self.reasons[fault] for fault in faults if fault in self.reasons]
        return self.call_refused.replace("{reason}", " ".join(reasons) or "The call could not be read.")


DIRECT_PROMPTS = Prompts(
    system=(
        "You are a helpful assistant. First reason inside <think> </think>, then give the final answer inside "
        "<answer> </answer>. For mathematics and multiple choice put the value or the letter into \\boxed{} inside "
        "the answer."
    ),
    task="{question}",
)
