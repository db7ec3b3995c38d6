"""Supervised fine-tuning on traces: ``vt-trl sft RECIPE``, a cold start for a policy that cannot make both moves yet.

A trace is a row with ``replies``, what the assistant says in its turns (``vt-trl prepare traces`` writes them). It is
played through the environment of the recipe, so that the model is trained on the very tokens its rollouts will have,
with loss on the replies alone. The training loop and the loss are TRL's ``SFTTrainer``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer

from vt_trl.chat import ChatEncoder
from vt_trl.checkpoints import MANIFEST
from vt_trl.data import BadRow, episode_row, leave_out, load_rows, require_good_rows
from vt_trl.dialogue import Dialogue, collate, demonstrate, replay
from vt_trl.envs import Environment, make_environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures, ImageSizes
from vt_trl.hub import list_model
from vt_trl.recipe import RunArguments, parse_recipe
from vt_trl.resume import EndInOrder, WholeCheckpoints
from vt_trl.run import freeze_vision, lora_config, open_config

_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "packing": (False, "dialogues with pictures cannot be joined"),
    "padding_free": (False, "it cannot take pictures"),
    "assistant_only_loss": (False, "loss is on what the assistant says in any case"),
    "completion_only_loss": (None, "loss is on what the assistant says in any case"),
    "chat_template_path": (None, "dialogues are laid out by the model family, not by a chat template"),
}


@dataclass
class VTSFTConfig(SFTConfig):
    """SFT settings of TRL plus the environment that the traces are played through.

    ``max_length`` bounds the tokens of a trace, for a cut one would teach half a picture. All traces are measured
    before the run; ``on_too_long`` says what becomes of longer ones.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["environment_args"]

    environment: str = field(default="resize", metadata={"help": "Environment of the policy, as for training."})
    environment_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the environment; the same as in the recipe that trains it next."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a trace at most; default no limit."})
    on_too_long: str = field(
        default="error",
        metadata={"help": "Longer traces stop the run before it starts, or are left out: error or skip."},
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the collator needs the row
        super().__post_init__()
        for name, (only, why) in _UNSUPPORTED.items():
            if getattr(self, name) != only:
                raise ConfigError(f"{name} is set to {getattr(self, name)!r}, which has no effect here: {why}.")
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}; it counts tokens. Leave it out for no limit.")
        if self.on_too_long not in ("error", "skip"):
            raise ConfigError(f"on_too_long is {self.on_too_long!r}; use error or skip.")
        make_environment(self.environment, self.environment_args)


class TraceCollator:
    """Rows with ``replies`` to a batch of tokens, labels and pictures; see :func:`vt_trl.dialogue.collate`.

    Raises DataError, with the row's id, for replies that are no clean episode.
    """

    def __init__(self, environment: Callable[[], Environment], encoder: ChatEncoder, pad_id: int):
        self.environment, self.encoder, self.pad_id = environment, encoder, pad_id
        self.image_token_id = encoder.tokenizer.convert_tokens_to_ids(encoder.family.image_token)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        features = self.encoder.features
        features.clear()
        demonstrations = [demonstrate(played(row, self.environment), self.encoder) for row in rows]
        return collate(demonstrations, features, pad_id=self.pad_id, image_token_id=self.image_token_id)


def played(row: Mapping[str, Any], environment: Callable[[], Environment]) -> Dialogue:
    """The dialogue of one trace. Raises DataError, with the row's id, for replies that are no clean episode.

    A trace has ``replies``; or ``segments`` and ``crops``, of which the environment makes replies in its own frame and
    shape (:meth:`vt_trl.envs.LookEnv.trace`).
    """
    try:
        player = environment()
        decoded = episode_row(row, player.max_pictures)
        if row.get("segments"):
            if not hasattr(player, "trace"):
                raise DataError(
                    "the trace has segments and crops, for the environments zoom and look; set environment"
                )
            return replay(player, decoded, player.trace(decoded, row["segments"], row.get("crops") or []))
        replies = row.get("replies")
        if not replies or not all(isinstance(reply, str) and reply.strip() for reply in replies):
            raise DataError("replies is empty, or no list of texts")
        return replay(player, decoded, replies)
    except DataError as error:
        raise error.at(id=str(row.get("id"))) from error


class VTSFTTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's trainer with checkpoints that are whole or not there, and an end in order on SIGTERM."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.end_in_order = EndInOrder(self)
        self.add_callback(self.end_in_order)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """TRL's; outside a checkpoint the list of files is written last, and says that the model is whole."""
        folder = Path(output_dir or self.args.output_dir)
        listed = self.args.should_save and not self._saving
        if listed:
            (folder / MANIFEST).unlink(missing_ok=True)
        super().save_model(str(folder), _internal_call=_internal_call)
        if listed:
            list_model(folder)


def sft(recipe: str | Path, overrides: Sequence[str] = (), **trainer_arguments: Any) -> VTSFTTrainer:
    """Run an SFT recipe to its end and save the model in its ``output_dir``; returns the trainer."""
    run, args = parse_recipe(recipe, overrides, VTSFTConfig)
    trainer = make_sft_trainer(run, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.end_in_order.asked:
        return trainer  # there may be seconds left: the checkpoint is saved, and that is enough
    trainer.save_state()  # the figures of every step
    trainer.save_model(args.output_dir, _internal_call=True)
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


def make_sft_trainer(run: RunArguments, args: VTSFTConfig, **trainer_arguments: Any) -> VTSFTTrainer:
    """Check the traces, load the model, and build TRL's trainer with our collator."""
    config = open_config(run, args)
    family = family_of(config)
    processor = AutoProcessor.from_pretrained(run.model, revision=run.model_revision)
    tokenizer = processor.tokenizer
    encoder = ChatEncoder(tokenizer, family, ImageFeatures(processor.image_processor))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    environment = make_environment(args.environment, args.environment_args, family.sight(processor.image_processor))
    sizes = ChatEncoder(tokenizer, family, ImageSizes(processor.image_processor))

    def checked(source: str, split: str | None, limit: int | None) -> Dataset:
        rows = traces(source, split, limit, run.on_bad_row, environment().max_pictures)
        return require_teachable(rows, environment, sizes, run.on_bad_row, args.max_length, args.on_too_long)

    rows = checked(run.dataset, run.dataset_split, run.max_rows)
    eval_rows = checked(run.eval_dataset, run.eval_split, run.max_eval_rows) if run.eval_dataset else None
    trainer = VTSFTTrainer(
        model=run.model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=TraceCollator(environment, encoder, pad_id),
        peft_config=lora_config(run, family),
        **trainer_arguments,
    )
    if not run.train_vision:
        freeze_vision(trainer.model, family)
    return trainer


def traces(source: str, split: str | None, limit: int | None, on_bad_row: str, most_pictures: int = 1) -> Dataset:
    """Good rows, with replies that are still to be looked at. Raises DataError when the column is missing."""
    rows = load_rows(source, split, limit)
    if not {"replies", "segments"} & set(rows.column_names):
        raise DataError(
            f"{source!r} has no column `replies` or `segments`, so it holds rows and no traces; write some with "
            f"`vt-trl prepare traces` or `vt-trl prepare vlir`"
        )
    return require_good_rows(rows, on_bad_row, most_pictures=most_pictures)


def require_teachable(
    rows: Dataset,
    environment: Callable[[], Environment],
    encoder: ChatEncoder,
    on_bad_row: str,
    max_length: int | None,
    on_too_long: str,
    workers: int = 4,
) -> Dataset:
    """The traces whose replies are a clean episode of at most ``max_length`` tokens; every one is played to see.

    ``on_bad_row`` and ``on_too_long``: "error" raises DataError that counts the others and names the first, "skip"
    leaves them out and says so in the log. Numbers of rows count what is left by then; ids stay.
    """

    tokenizing = Lock()  # pictures are read side by side, but tokenizers change their state

    def length(number: int) -> int | BadRow:
        row = rows[number]
        try:
            dialogue = played(row, environment)
        except DataError as error:
            return BadRow(number, str(row.get("id")), error.reason)
        with tokenizing:
            return len(demonstrate(dialogue, encoder).token_ids)

    with ThreadPoolExecutor(workers) as pool:
        lengths = list(pool.map(length, range(len(rows))))
    bad = [one for one in lengths if isinstance(one, BadRow)]
    rows = leave_out(rows, bad, "on_bad_row", on_bad_row, "are no traces to be taught")
    lengths = [one for one in lengths if not isinstance(one, BadRow)]
    ids = rows["id"]
    long = [
        BadRow(number, ids[number], f"too long: {tokens} tokens")
        for number, tokens in enumerate(lengths)
        if max_length is not None and tokens > max_length
    ]
    what = f"are longer than max_length ({max_length} tokens; the longest has {max(lengths)})"
    remedy = "Raise max_length, lower max_pixels in environment_args"
    return leave_out(rows, long, "on_too_long", on_too_long, what, remedy)
