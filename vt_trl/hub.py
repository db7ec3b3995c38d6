"""What a trainer puts next to its weights, and how folders get to the Hub.

A folder with weights also holds a model card, the notes of the run and generation settings that keep banned tokens
banned. Only files of :data:`PUBLISHED` are pushed with a model: no pickles, no optimizer, nothing unfinished. The
token is sent to the Hub and goes nowhere else.
"""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import GenerationConfig
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from vt_trl import __version__
from vt_trl.card import render_card
from vt_trl.checkpoints import MANIFEST, write_manifest
from vt_trl.errors import CheckpointError
from vt_trl.redact import redacted
from vt_trl.run_notes import FILE as NOTES
from vt_trl.run_notes import NoteKeeper, secrets_of

logger = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
PUBLISHED = (
    *WEIGHTS,
    NOTES,  # without them, nobody would ask the model as it was trained
    "generation_config.json",
    "README.md",
    "LICENSE*",
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)


class HubError(CheckpointError):
    """The Hub could not be reached or refused. The message says where the files lie and how to push them; no token."""


def published_files(folder: str | Path) -> list[Path]:
    """The files of a folder that belong to a published model, by name."""
    names = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(path for path in names if any(fnmatch.fnmatch(path.name, pattern) for pattern in PUBLISHED))


def open_repo(name: str, token: str | None, private: bool | None) -> str:
    """Create a model repository unless it is there; returns its full name. Raises HubError."""
    try:
        return _api().create_repo(name, token=token, private=private, exist_ok=True).repo_id
    except Exception as error:  # network, refusal, no token, a name that is none: all leave the user where he was
        raise HubError(f"The Hub does not open the repository {name!r}: {_why(error, token)}") from error


def upload(folder: str | Path, repo: str, message: str, token: str | None = None, **kwargs: Any) -> Any:
    """Push the published files of a folder; ``kwargs`` as for ``HfApi.upload_folder``. Raises HubError."""
    names = {"allow_patterns": [path.name for path in published_files(folder)]} | kwargs
    try:
        return _api().upload_folder(repo_id=repo, folder_path=folder, commit_message=message, token=token, **names)
    except Exception as error:  # as above
        raise HubError(f"{folder} could not be pushed to {repo!r}: {_why(error, token)}") from error


def _api() -> HfApi:
    return HfApi(library_name="vt_trl", library_version=__version__)


def _why(error: Exception, token: str | None) -> str:
    return redacted(f"{type(error).__name__}: {error}", [*secrets_of(), *([token] if token else [])])


def generation_settings(banned: list[int], stop: list[int], pad: int, repetition_penalty: float) -> GenerationConfig:
    """Greedy, as the policy was evaluated; the base model's own settings may sample or penalise repetition."""
    return GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(stop),
        pad_token_id=pad,
        repetition_penalty=repetition_penalty,
        suppress_tokens=sorted(banned),
    )


def list_model(folder: Path) -> None:
    """Note that a folder's model is whole; card and notes are left out, which a run that goes on writes again."""
    write_manifest(folder, [path for path in published_files(folder) if path.name not in ("README.md", NOTES)])


class HubTrainer:
    """Mixin for a GRPO trainer: notes of the run, a card next to all weights, and pushing."""

    _tags: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        # Settings are pickled next to every checkpoint, logged and printed; the token is needed here alone.
        self._hub_token, kwargs["args"].hub_token = kwargs["args"].hub_token, None
        super().__init__(*args, **kwargs)
        self.note_keeper = NoteKeeper(self)
        self.add_callback(self.note_keeper)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's, with card, notes and generation settings; outside a checkpoint the list of files is written last."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not self._saving:
            (folder / MANIFEST).unlink(missing_ok=True)
        super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            settings = generation_settings(
                self.banned_ids, self.stop_ids, self._tokenizer.pad_token_id, self.repetition_penalty
            )
            settings.save_pretrained(folder)
            self._write_card(folder)
            if not self._saving:
                list_model(folder)
        if self.args.push_to_hub and not _internal_call:
            self._push_saved(folder, "Model save")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write our card and the notes into the output folder; TRL calls it before a checkpoint and before a push."""
        if self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self._tags = (tags,) if isinstance(tags, str) else tuple(tags or self._tags)
            self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        notes = self.note_keeper.current()
        notes.write(folder)
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).name
        (folder / "README.md").write_text(render_card(notes, name, tags=self._tags), encoding="utf-8")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = open_repo(name, token or self._hub_token, private)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | list[str] | None = None,
    ) -> Any:
        """Save the model and push it, with ``tags`` in its card. Raises HubError, with the model saved."""
        self._tags = (tags,) if isinstance(tags, str) else tuple(tags or self._tags)
        self.save_model(_internal_call=True)
        return self._push_saved(Path(self.args.output_dir), commit_message, blocking, token, revision, private)

    def _push_saved(
        self,
        folder: Path,
        message: str | None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        token = token or self._hub_token
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token, private)
            self._finish_current_push()
            revision = revision or self.args.hub_revision
            return upload(folder, self.hub_model_id, message, token, revision=revision, run_as_future=not blocking)
        except HubError as error:
            repo = self.hub_model_id or self.args.hub_model_id or folder.absolute().name
            raise HubError(
                f"The model is saved in {folder}, but not on the Hub. {error} When the Hub answers: "
                f"`vt-trl export {folder} --push {repo}`."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete checkpoint in the background."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        common = {"token": self._hub_token, "run_as_future": True, "revision": args.hub_revision}
        jobs = [upload(checkpoint_folder, self.hub_model_id, message, **common)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):  # to resume from: every file
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            common |= {"path_in_repo": "last-checkpoint" if last else Path(checkpoint_folder).name}
            message = f"{message}, checkpoint"
            jobs.append(upload(checkpoint_folder, self.hub_model_id, message, allow_patterns=None, **common))
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        """Wait for a push in the background. One that failed is a warning: the next one carries newer weights."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        push.wait_until_done()
        self.push_in_progress = None
        for job in push.jobs:
            error = job.exception()
            if error is not None:
                why = _why(error, self._hub_token)
                logger.warning(f"A checkpoint was not pushed to {self.hub_model_id}: {why}. It is kept on the disk.")
