"""The texts of the environments that look again and again. Every one can be replaced from a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vt_trl.boxes import FRAME_WORDS
from vt_trl.prompts import CALL_FAULTS, Prompts, hermes_system
from vt_trl.types import Fault

if TYPE_CHECKING:
    from vt_trl.envs.tools import Tool

_FAULTS = {
    **CALL_FAULTS,
    Fault.WRONG_TOOL: "There is no tool of that name.",
    Fault.WRONG_ARGUMENTS: "The arguments do not fit the tool's signature.",
    Fault.BAD_JSON: "It is no JSON object of the layout that was asked for.",
    Fault.SEVERAL_BOXES: "Only one box is possible at a time, and several were written.",
    Fault.BOX_NO_NUMBERS: "The box is not four numbers [x1, y1, x2, y2].",
    Fault.BOX_NOT_FINITE: "The box holds a number that is not finite.",
    Fault.BOX_REVERSED: "The box is reversed: x1 < x2 and y1 < y2 are needed.",
    Fault.BOX_EMPTY: "The box is empty: x1 < x2 and y1 < y2 are needed.",
    Fault.BOX_OUTSIDE: "The box lies outside the image.",
    Fault.BOX_TINY: "The box is too small or too thin to be shown.",
    Fault.NO_SUCH_IMAGE: "There is no image of that number.",
    Fault.OVER_BUDGET: "It would take more room than is left for images.",
    Fault.CALL_AFTER_IMAGE: "The image is at full resolution already.",
}


@dataclass(frozen=True)
class LookPrompts(Prompts):
    """As :class:`~vt_trl.prompts.Prompts`, and what follows a picture.

    ``label``: with ``{number}`` and ``{size}`` filled in; ``at_full``: behind it, when a tool showed all there is.
    With shape ``inline`` the texts around a picture and the refusal stand inside the assistant's turn.
    """

    label: str = "\nImage {number}, {size} pixels.\n"
    at_full: str = "It is at full resolution.\n"

    reasons: ClassVar[Mapping[Fault, str]] = _FAULTS

    @classmethod
    def usual(cls, shape: str, tools: Sequence[Tool], frame: str, turns: int) -> LookPrompts:
        """The texts of a shape, for tools, a box frame and a number of turns."""
        numbered = tools[0].numbered
        size = "{size} pixels" if frame == "shown_pixels" else ""
        if numbered:
            label = f"\nImage {{number}}{size and ', '}{size}.\n"
        else:
            label = f"\nThe image is shown at {size}.\n" if size else "\n"
        looks = turns - 1
        times = "once" if looks == 1 else f"up to {looks} times"
        if shape == "inline":
            return cls(
                system="You are a helpful assistant.",
                task=(
                    "{question}\n\n"
                    "Reason inside <think> </think>. When a detail matters, write where it is as "
                    f'{{"bbox_2d": [x1, y1, x2, y2]}}, {FRAME_WORDS[frame]}: that part is then shown enlarged, and '
                    f"you go on. You can do so {times}. Then give the final answer inside <answer> </answer>. For "
                    "mathematics and multiple choice put the value or the letter into \\boxed{} inside the answer."
                ),
                before_image="\n",
                after_image="\n",
                call_refused="\n[Nothing is shown. {reason}]\n",
                label=label,
            )
        names = " or ".join(tool.name for tool in tools)
        return cls(
            system=hermes_system([tool.signature(frame) for tool in tools]),
            task=(
                "{question}\n\n"
                "First reason inside <think> </think>. Then do one of two things: if what you see is enough, give the "
                "final answer inside <answer> </answer>; if details that matter cannot be made out, call "
                f"{names} inside <tool_call> </tool_call> to look again. You can do so {times}. Looking costs time, "
                "so do it only where it helps. For mathematics and multiple choice put the value or the letter into "
                "\\boxed{} inside the answer."
            ),
            before_image="<tool_response>\n",
            after_image=(
                "\n</tool_response>\nContinue: reason inside <think> </think>, then look again or answer inside "
                "<answer> </answer>."
            ),
            call_refused=(
                "<tool_response>\nThe call was not carried out. {reason}\n</tool_response>\n"
                "Reason inside <think> </think>, then look again or answer inside <answer> </answer>."
            ),
            label=label,
        )

    def labelled(self, number: int, size: tuple[int, int]) -> str:
        return self.label.replace("{number}", str(number)).replace("{size}", f"{size[0]} x {size[1]}")
