"""A trained policy as a pipeline: pictures and questions in, answers and the turns that led to them out.

    pipe = VisionThinkPipeline("runs/mine-export")
    result = pipe(image="receipt.png", question="What is the total?")
    print(result.answer, result.asked, result.visual_tokens)

It plays by the rollout loop that trains, greedy in every turn, with the tokens that were banned in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vt_trl.envs.inline import boxes_in
from vt_trl.envs.reply import parse_reply
from vt_trl.errors import ConfigError, DataError
from vt_trl.features import ImageSizes
from vt_trl.images import load_image
from vt_trl.inference import PolicyModel
from vt_trl.policies import parse_policy, trained_policy
from vt_trl.rollout import Step
from vt_trl.transcripts import Transcript
from vt_trl.types import Rollout, Turn

_NEEDED = {"image", "question"}


@dataclass(frozen=True)
class PipelineTurn:
    """One reply of the policy, as it was written.

    ``index``: of the input it belongs to; ``turn``: counted from 0; ``answer``: the text in its answer tags;
    ``called``: it called a tool; ``pictures``: what it was shown next; ``faults``: what was wrong with its form.
    ``result``: everything, with the last turn of an input.
    """

    index: int
    turn: int
    text: str
    answer: str | None
    called: bool
    generated_tokens: int
    faults: tuple[str, ...] = ()
    pictures: tuple[Image.Image, ...] = ()
    result: PipelineResult | None = field(default=None, repr=False)

    @classmethod
    def of(cls, index: int, number: int, turn: Turn, **more: Any) -> PipelineTurn:
        parsed = parse_reply(turn.text)
        called = parsed.wants_call or bool(boxes_in(turn.text))
        faults = tuple(fault.value for fault in turn.faults)
        return cls(index, number, turn.text, parsed.answer, called, len(turn.token_ids), faults=faults, **more)


@dataclass(frozen=True)
class PipelineResult:
    """What became of one input.

    ``answer``: None when the policy gave none; ``status`` says how it ended (:class:`vt_trl.types.RolloutStatus`).
    ``asked``: more was asked for and shown, such as the full picture or a part of it. ``pictures``: what the model
    saw, in order and as it saw it. ``visual_tokens`` are in all pictures, ``prompt_tokens`` in the opening (pictures
    included), ``generated_tokens`` sampled in all turns.
    """

    answer: str | None
    status: str
    asked: bool
    turns: tuple[PipelineTurn, ...]
    visual_tokens: int
    prompt_tokens: int
    generated_tokens: int
    pictures: tuple[Image.Image, ...] = field(repr=False)
    rollout: Rollout = field(repr=False)

    @classmethod
    def of(cls, rollout: Rollout, index: int = 0) -> PipelineResult:
        return cls(
            answer=rollout.answer,
            status=rollout.status.value,
            asked=rollout.asked,
            turns=tuple(PipelineTurn.of(index, number, turn) for number, turn in enumerate(rollout.turns)),
            visual_tokens=rollout.visual_tokens,
            prompt_tokens=len(rollout.prompt_ids),
            generated_tokens=sum(rollout.loss_mask),
            pictures=tuple(rollout.images),
            rollout=rollout,
        )

    def _repr_html_(self) -> str:
        """How notebooks show it: the whole episode, with its pictures."""
        return Transcript.of(self.rollout)._repr_html_()


class VisionThinkPipeline:
    """Answers questions about pictures.

    Args:
        model: a folder or a Hub name, full weights or a merged export.
        backend: ``transformers``, ``vllm``, or ``auto``.
        device: default: the GPU if there is one; dtype: default: bfloat16 on a GPU, float32 elsewhere.
        policy: ``two-turn``, ``always-full`` and the others of :mod:`vt_trl.policies`; default: as trained.
        environment_args: settings of its environment; default: as trained.
        batch_size: inputs that are answered together; vLLM takes all at once.
        Others are those of :class:`vt_trl.inference.PolicyModel`.

    Raises:
        ConfigError: for a model that does not load, or settings that cannot work.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        backend: str = "transformers",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        policy: str | None = None,
        environment_args: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        **settings: Any,
    ):
        self.batch_size = _checked(batch_size)
        self.model = PolicyModel(model, backend=backend, device=device, dtype=dtype, **settings)
        chosen = parse_policy(policy) if policy else trained_policy(self.model.notes.environment)
        self.policy = chosen.name
        self.environment = chosen.environment(self.model.settings_for(chosen, environment_args), self.model.sight)
        self.runner = self.model.runner(self.environment)

    def __call__(
        self,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        image: Any = None,
        question: str | None = None,
        batch_size: int | None = None,
        stream: bool = False,
    ) -> PipelineResult | list[PipelineResult] | Iterator[PipelineTurn]:
        """Answer one input (``image=..., question=...`` or a mapping of the two) or a list of them, in its order.

        ``image``: a PIL picture, bytes, or a local path; where the environment takes several (``look``) a list of
        them, which the question calls image 1, image 2 and so on. ``stream``: an iterator over turns as they end
        instead; the last turn of an input carries its ``result``. Raises DataError for a picture that cannot be read
        or shown.
        """
        single = inputs is None or isinstance(inputs, Mapping)
        if inputs is None:
            inputs = {"image": image, "question": question}
        elif image is not None or question is not None:
            raise ConfigError("both inputs and image or question are given; give one of them.")
        rows = [_row(one, number) for number, one in enumerate([inputs] if single else inputs)]
        size = self.batch_size if batch_size is None else _checked(batch_size)
        turns = self._turns(rows, len(rows) if self.model.uses_vllm else size)
        if stream:
            return turns
        found = {turn.index: turn.result for turn in turns if turn.result is not None}
        results = [found[number] for number in range(len(rows))]
        return results[0] if single else results

    @torch.no_grad()
    def watch(self, *, image: Any, question: str) -> Iterator[Rollout]:
        """One input as it goes on: what the model is shown first, then the whole dialogue after each turn.

        Only the last rollout has a status. Close the iterator to give the rest up. Raises DataError like a call.
        """
        self.model.parts.features.clear()
        yield from self.runner.watch(_row({"image": image, "question": question}, 0), self.model.sampling)

    def tokens_in_full(self, image: Any) -> int | None:
        """Visual tokens of the picture in full, what always-full pays for it; None for an environment without a rule.

        Raises DataError for a picture that cannot be read or shown.
        """
        rule = getattr(self.environment(), "rule", None)
        sizes = ImageSizes(self.model.parts.processor.image_processor)
        return None if rule is None else sizes.visual_tokens(rule.views(load_image(image)).full)

    @torch.no_grad()
    def _turns(self, rows: list[dict[str, Any]], batch_size: int) -> Iterator[PipelineTurn]:
        for start in range(0, len(rows), max(batch_size, 1)):
            self.model.parts.features.clear()
            counts: dict[int, int] = {}
            for step in self.runner.steps(rows[start : start + batch_size], self.model.sampling):
                counts[step.index] = counts.get(step.index, -1) + 1
                yield _turn(step, start + step.index, counts[step.index])


def _turn(step: Step, index: int, number: int) -> PipelineTurn:
    pictures = tuple(image for message in step.shown for image in message.images)
    result = None if step.rollout is None else PipelineResult.of(step.rollout, index)
    return PipelineTurn.of(index, number, step.turn, pictures=pictures, result=result)


def _row(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One input as an environment reads it."""
    if not isinstance(given, Mapping) or not set(given) >= _NEEDED:
        raise DataError("an input needs image and question", row=number)
    question = given["question"]
    if not isinstance(question, str) or not question.strip():
        raise DataError("the question is empty or no text", row=number)
    several = isinstance(given["image"], list | tuple)
    if several and not given["image"]:
        raise DataError("the list of pictures is empty", row=number)
    try:
        images = [load_image(one) for one in (given["image"] if several else [given["image"]])]
    except DataError as error:
        raise error.at(row=number) from error
    own = {"image": images[0], "images": images if len(images) > 1 else None, "question": question, "answer": []}
    return {"id": str(number), **given, **own}


def _checked(batch_size: int) -> int:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it counts inputs, so set 1 or more.")
    return batch_size
