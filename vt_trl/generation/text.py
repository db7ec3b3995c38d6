"""A text-only language model on this machine: messages of text in, sampled replies out, on transformers or vLLM.

Whatever stands in a message never becomes a control token: the chat template is rendered around a slot, and the text
is encoded for itself with the tokenizer's special tokens switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vt_trl.errors import ConfigError
from vt_trl.generation.base import Backend, Request, SamplingSettings
from vt_trl.generation.hf import HFBackend
from vt_trl.generation.standalone import Checkpoint, load_part, stop_ids_of

_SLOT = "TEXT-GOES-HERE"


def chat_frame(tokenizer: Any, before: str, model: str, system: str | None = None, **template: Any) -> tuple[str, str]:
    """The chat around a user's text that follows ``before``: what the template writes in front of it and behind it.

    ``template``: settings of the model's chat template, such as ``enable_thinking``. Raises ConfigError for a model
    without one, or with one that leaves out what it is told.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": before + _SLOT})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    except ValueError as error:
        raise ConfigError(f"model is {model!r}, which has no chat template: {error}") from error
    head, slot, tail = text.partition(_SLOT)
    if not slot or not all(part.strip() in head for part in (before, system or "")):
        raise ConfigError(f"model is {model!r}, whose chat template drops what it is told.")
    return head, tail


@dataclass(frozen=True)
class TextReply:
    """A sampled reply without its stop token. ``cut``: the token limit ended it."""

    text: str
    cut: bool
    prompt_tokens: int
    tokens: int


class TextModel:
    """A causal language model with a chat template, such as Qwen3 or a distilled R1; weights are loaded at once.

    ``max_tokens``: of a reply; ``context``: tokens of prompt and reply together, needed by vLLM.
    Raises ConfigError when it does not load.
    """

    def __init__(self, checkpoint: Checkpoint, max_tokens: int, context: int = 16_384, **template: Any):
        self.model, self.max_tokens, self.template = checkpoint.model, max_tokens, template
        self.context = context
        self.tokenizer = load_part(checkpoint, AutoTokenizer.from_pretrained)
        config = load_part(checkpoint, AutoConfig.from_pretrained)
        try:
            generation = GenerationConfig.from_pretrained(checkpoint.model, revision=checkpoint.revision)
        except OSError:  # a checkpoint need not have any
            generation = GenerationConfig()
        self.stop_ids = stop_ids_of(self.tokenizer, generation)
        banned = range(len(self.tokenizer), config.get_text_config().vocab_size)  # rows of the head without a token
        self.backend = _open_backend(checkpoint, self.tokenizer, sorted(self.stop_ids), list(banned), context)

    def sample(
        self, prompts: Sequence[tuple[str, str]], seeds: Sequence[int | None], settings: SamplingSettings
    ) -> list[TextReply | str]:
        """One reply per prompt ``(instructions, text)`` in their order, or why there is none.

        Each is drawn from a random stream of its own, that of its seed.
        """
        ids = [self.prompt_ids(*prompt) for prompt in prompts]
        replies: list[TextReply | str] = [f"a prompt of {len(one)} tokens leaves no room for a reply" for one in ids]
        self.backend.begin(settings)
        try:
            for number, (one, seed) in enumerate(zip(ids, seeds, strict=True)):
                room = min(self.max_tokens, self.context - len(one))
                if room > 0:
                    self.backend.submit(Request(number, tuple(one), (), room, seed))
            for sample in self.backend.completed():
                said = [token for token in sample.token_ids if token not in self.stop_ids]
                text = self.tokenizer.decode(said, skip_special_tokens=False)
                prompt_tokens = len(ids[sample.request_id])
                replies[sample.request_id] = TextReply(text, not sample.finished, prompt_tokens, len(sample.token_ids))
        finally:
            self.backend.end()
        return replies

    def prompt_ids(self, instructions: str, text: str) -> list[int]:
        head, tail = chat_frame(self.tokenizer, f"{instructions}\n", self.model, **self.template)
        middle = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail))
        return [*before, *middle, *after]


def _open_backend(
    checkpoint: Checkpoint, tokenizer: Any, stop_ids: list[int], banned_ids: list[int], context: int
) -> Backend:
    known = {"banned_ids": banned_ids, "image_token_id": -1}  # no token is a picture
    if not checkpoint.uses_vllm:
        model = load_part(checkpoint, AutoModelForCausalLM.from_pretrained, dtype=checkpoint.torch_dtype)
        model = model.to(checkpoint.usual_device).eval().requires_grad_(False)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
        return HFBackend.for_model(
            model, None, pad_id=pad, stop_ids=stop_ids, max_batch=checkpoint.max_batch, tokenizer=tokenizer, **known
        )
    from vt_trl.generation.fixed_engine import FixedEngine
    from vt_trl.generation.vllm import VLLMBackend

    engine = FixedEngine(
        model=checkpoint.model,
        revision=checkpoint.revision,
        dtype=checkpoint.torch_dtype,
        max_model_length=context,
        max_num_seqs=checkpoint.max_batch,
        gpu_memory_utilization=checkpoint.gpu_memory_utilization,
    )
    return VLLMBackend(engine, eos_token_ids=stop_ids, weights_version=lambda: 0, **known)


def text_checkpoint(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a text-only model, by its configuration: none of the vision-language families."""
    from vt_trl.families import is_known

    return not is_known(load_part(checkpoint, AutoConfig.from_pretrained))
