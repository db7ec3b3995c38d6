"""A checkpoint in users' hands: loaded once, and played by the rollout loop that trains. Greedy, as it was evaluated.

Evaluation, the pipeline and the demos get their runners here. Tokens that were banned in training stay banned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from vt_trl.boxes import Sight
from vt_trl.envs import Environment
from vt_trl.errors import ConfigError
from vt_trl.generation.backends import largest_image_tokens
from vt_trl.generation.base import Backend, SamplingSettings
from vt_trl.generation.standalone import Checkpoint, close_engine, open_backend, open_parts
from vt_trl.images import ResolutionRule
from vt_trl.policies import Policy, trained_settings
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.run_notes import FILE, RunNotes

DTYPES = ("auto", "bfloat16", "float16", "float32")
_TURN, _COMPLETION, _CONTEXT = 2048, 32_768, 32_768  # tokens, where neither the caller nor the notes say anything


class PolicyModel:
    """A folder or a Hub name with full weights (an adapter is exported with ``--merge`` first), ready to play.

    Args:
        model: where it is; ``revision`` of a Hub name.
        backend: ``transformers``, ``vllm`` (needs ``vt-trl[vllm]``), or ``auto``: vLLM where it and a GPU are.
        device: for transformers; default: the GPU if there is one.
        dtype: of the weights; ``auto``: bfloat16 on a GPU, float32 elsewhere.
        max_turn_tokens: sampled tokens of one turn; default: as in training, else 2048.
        max_completion_length: tokens of a whole completion; default: as in training, else 32,768.
        max_model_length: context of vLLM, in tokens.
        max_batch: sequences at a time.
        max_images: most pictures in one context, for vLLM, the ones shown on request included.

    Raises:
        ConfigError: for a model that is not there, does not load, or is an adapter.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        backend: str = "transformers",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        max_turn_tokens: int | None = None,
        max_completion_length: int | None = None,
        max_model_length: int = _CONTEXT,
        max_batch: int = 128,
        max_images: int = 2,
    ):
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}.")
        device = None if device is None else str(device)
        self.max_images, self._image_pixels = max_images, ResolutionRule().max_pixels
        self.checkpoint = Checkpoint(str(model), revision, backend, dtype, max_batch, device=device)
        self.parts = open_parts(self.checkpoint)
        self.notes = self._read_notes()
        recipe = self.notes.recipe or {}
        self.limits = Limits(
            max_turn_tokens or self.notes.environment.get("max_turn_tokens") or _TURN,
            max_completion_length or recipe.get("max_completion_length") or _COMPLETION,
            max_model_length if self.uses_vllm else None,
        )
        # Base models have settings for chatting, such as a penalty of 1.05, which no policy was trained with.
        penalty = self.parts.generation_config.repetition_penalty if self.notes.environment else None
        self.sampling = SamplingSettings(temperature=0.0, repetition_penalty=penalty or 1.0)

    @property
    def sight(self) -> Sight:
        """How the model sees pictures, for environments that have to know."""
        return self.parts.sight

    @property
    def uses_vllm(self) -> bool:
        return self.checkpoint.uses_vllm

    def _read_notes(self) -> RunNotes:
        quiet = dict.fromkeys(("missing_entries", "connection_errors", "gated_repo"), False)
        quiet = {f"_raise_exceptions_for_{name}": value for name, value in quiet.items()}
        place = str(Path(self.checkpoint.model).expanduser())
        found = cached_file(place, FILE, revision=self.checkpoint.revision, **quiet)
        return RunNotes() if found is None else RunNotes.read(Path(found).parent)

    def identity(self) -> dict[str, Any]:
        """What tells these weights from others: a commit on the Hub, or names, sizes and times of files."""
        folder = Path(self.checkpoint.model).expanduser()
        if not folder.is_dir():
            return {"name": self.checkpoint.model, "commit": getattr(self.parts.config, "_commit_hash", None)}
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
        files = [path for path in files if path.name != FILE]
        return {"files": {path.name: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files}}

    @cached_property
    def backend(self) -> Backend:
        """Loads the weights when first asked for."""
        image_tokens = largest_image_tokens(self.parts.processor, self._image_pixels)
        return open_backend(self.checkpoint, self.parts, self.limits.context, self.max_images, image_tokens)

    def close(self) -> None:
        """Give the weights up before another model is loaded; with vLLM its process ends."""
        close_engine(self.__dict__.pop("backend", None))

    def settings_for(self, policy: Policy, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Settings of a policy's environment: as in training, where the notes say so, and ``args`` over them."""
        return trained_settings(policy, self.notes.environment) | dict(args or {})

    def runner(self, environment: Callable[[], Environment], pictures: int = 1) -> RolloutRunner:
        """The rollout loop of training on this model. Raises ConfigError when vLLM was started for fewer pictures.

        ``pictures``: the most that a question has, where that is more than the environment counts with.
        """
        example = environment()
        images = example.max_images * (pictures if example.any_pictures and pictures > example.max_pictures else 1)
        pixels = max(self._image_pixels, example.max_image_pixels or 0)
        if "backend" not in vars(self):
            self.max_images, self._image_pixels = max(self.max_images, images), pixels
        elif self.uses_vllm and (self.max_images < images or self._image_pixels < pixels):
            raise ConfigError(
                f"the environment shows up to {images} pictures of {pixels} pixels, and vLLM was started "
                f"for {self.max_images} of {self._image_pixels}; evaluate this policy in a run of its own."
            )
        return self.parts.runner(self.backend, environment, self.limits)
