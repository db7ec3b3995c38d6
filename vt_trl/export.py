"""A run or one of its checkpoints as a folder that ``from_pretrained`` and vLLM load, with a model card."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vt_trl.card import render_card
from vt_trl.checkpoints import MANIFEST, checkpoints_in, last_checkpoint, problem_with
from vt_trl.errors import ConfigError
from vt_trl.families import family_of
from vt_trl.hub import HubError, generation_settings, open_repo, published_files, upload
from vt_trl.run_notes import RunNotes

logger = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"
SUFFIX = "-export"
DTYPES = ("bfloat16", "float16", "float32")


def export(
    run: str | Path,
    checkpoint: str | None = None,
    merge: bool = False,
    out: str | Path | None = None,
    dtype: str | None = None,
    push: str | None = None,
    private: bool | None = None,
) -> Path:
    """Write the folder and return its path; nothing is left behind when it cannot be finished.

    Args:
        run: output folder of a run, or one checkpoint.
        checkpoint: a step, ``best``, ``last``; default: the final model, else the newest complete checkpoint.
        merge: add a LoRA adapter to the weights of its base (computed in fp32).
        out: folder to write, new or empty; default: the run's name with ``-export``.
        dtype: of the weights; default: as saved, or as the base's when merging.
        push: name of a repository on the Hub to push it to; ``private``: when it is created.

    Raises:
        ConfigError: for weights that are incomplete, missing or no safetensors, or options that contradict them.
        HubError: when the folder is written, but could not be pushed.
    """
    source, notes = find_weights(Path(run), checkpoint)
    adapter = _adapter_of(source)
    if merge and adapter is None:
        raise ConfigError(f"--merge is set, but {source} holds full weights and no adapter; leave it out.")
    merged = adapter is not None and merge
    if push and adapter and not merge and Path(adapter["base_model_name_or_path"]).exists():
        raise ConfigError(
            f"The base of this adapter is the folder {adapter['base_model_name_or_path']}, which nobody else has: the "
            f"pushed adapter could not be loaded. Add --merge."
        )
    out = _free(Path(out) if out else _default_out(Path(run)))
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        os.chmod(staged, 0o755)  # a temporary folder is nobody else's to read
        _write(source, staged, adapter if merged else None, dtype)
        _write_generation_config(source, staged, adapter)
        notes.adapter = adapter is not None
        (staged / "README.md").write_text(render_card(notes, push or out.name, merged=merged), encoding="utf-8")
        notes.write(staged)  # prompts, resolution and limits, for whoever plays the exported model
        os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if push:
        _push(out, push, private, notes.step)
    return out


def find_weights(run: Path, checkpoint: str | None) -> tuple[Path, RunNotes]:
    """The folder to export and the run's notes as they are true of it. Raises ConfigError when it is not complete."""
    if not run.is_dir():
        raise ConfigError(f"There is no folder {run}; give the output folder of a run, or a checkpoint in it.")
    best = RunNotes.read(run).best
    source = _choose(run, checkpoint, best)
    problem = problem_with(source)
    if problem is not None:
        others = [path.name for path in checkpoints_in(run) if problem_with(path) is None]
        hint = f"complete are {', '.join(others)}" if others else "no complete checkpoint is left"
        raise ConfigError(f"{source} is not complete, so it is not exported: {problem}; {hint}.")
    notes = RunNotes.read(source)
    if source != run and best is not None:
        notes.best = best  # what is known now, not when the checkpoint was written
    return source, notes


def _choose(run: Path, checkpoint: str | None, best: dict[str, Any] | None) -> Path:
    found = checkpoints_in(run)
    if checkpoint is None:
        if not found or (run / MANIFEST).exists():
            return run
        checkpoint = "last"
    if checkpoint == "last":
        last = last_checkpoint(run)
        if last is None:
            raise ConfigError(f"{run} has no complete checkpoint.")
        return last
    if checkpoint == "best":
        if best is None:
            raise ConfigError(
                f"No best checkpoint of {run} is known: the run set no metric_for_best_model, or was never evaluated. "
                f"Name a step, or use last."
            )
        checkpoint = str(best["step"])
    named = run / f"checkpoint-{checkpoint}"
    if named in found:
        return named
    if (run / MANIFEST).exists() and str(RunNotes.read(run).step) == checkpoint:
        return run  # the final model is of that step
    there = ", ".join(path.name for path in found) or "none"
    raise ConfigError(f"{run} holds no weights of step {checkpoint}; there are: {there}.")


def _adapter_of(source: Path) -> dict[str, Any] | None:
    """The settings of a LoRA adapter, None for full weights. Raises ConfigError when there are no safetensors."""
    path = source / ADAPTER
    weights = "adapter_model.safetensors" if path.is_file() else "*.safetensors"
    if not list(source.glob(weights)):
        raise ConfigError(
            f"{source} holds no weights in the safetensors format. Shards of DeepSpeed or FSDP have to be gathered "
            f"first (zero_to_fp32.py, or `accelerate merge-weights`); pickled weights are not read."
        )
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _default_out(run: Path) -> Path:
    run = run.resolve()
    root, step = (run.parent, f"-{run.name}") if run.name.startswith("checkpoint-") else (run, "")
    return root.with_name(f"{root.name}{step}{SUFFIX}")


def _free(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; remove it, or choose another folder with --out.")
    return out


def _write(source: Path, target: Path, merge: dict[str, Any] | None, dtype: str | None) -> None:
    """Weights, configuration and processor; not the card, which is of this export."""
    for path in published_files(source):
        weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.name == "README.md" or (merge and (weights or path.name == ADAPTER)):
            continue
        if dtype and path.suffix == ".safetensors":
            _cast(path, target / path.name, getattr(torch, dtype))
        else:
            shutil.copyfile(path, target / path.name)
    if merge:
        _merge(source, target, merge, dtype)
    elif dtype:
        _name_dtype(target, dtype)


def _cast(path: Path, target: Path, dtype: torch.dtype) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(tensors, target, metadata=file.metadata())


def _name_dtype(target: Path, dtype: str) -> None:
    """Let config.json and the shards' index say what the weights are."""
    config = target / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = dtype
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    index = target / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        values["metadata"] = {**values.get("metadata", {}), "total_size": size}
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _merge(source: Path, target: Path, adapter: dict[str, Any], dtype: str | None) -> None:
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    try:
        published = AutoConfig.from_pretrained(base, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(base, revision=revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {base!r} of the adapter in {source} does not load: {error}") from error
    model = PeftModel.from_pretrained(model, source).merge_and_unload()
    model = model.to(getattr(torch, dtype) if dtype else published.dtype or torch.float32)
    model.generation_config = GenerationConfig()  # written below, without the base's habits
    model.save_pretrained(target)


def _write_generation_config(source: Path, target: Path, adapter: dict[str, Any] | None) -> None:
    """The trainer's own settings where it wrote them; for a checkpoint of an earlier version they are made here."""
    saved = source / "generation_config.json"
    if saved.is_file() and "suppress_tokens" in json.loads(saved.read_text(encoding="utf-8")):
        shutil.copyfile(saved, target / saved.name)
        return
    base = adapter["base_model_name_or_path"] if adapter else source
    config, given = AutoConfig.from_pretrained(base), GenerationConfig.from_pretrained(base).eos_token_id
    tokenizer = AutoProcessor.from_pretrained(source).tokenizer
    stop = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    banned = family_of(config).banned_ids(tokenizer, config.get_text_config().vocab_size, stop)
    generation_settings(banned, list(stop), tokenizer.pad_token_id, 1.0).save_pretrained(target)


def _push(out: Path, repo: str, private: bool | None, step: int) -> None:
    try:
        upload(out, open_repo(repo, None, private), f"Weights of step {step}")
    except HubError as error:
        raise HubError(f"The export is in {out}. {error} When the Hub answers: `hf upload {repo} {out} .`.") from error
