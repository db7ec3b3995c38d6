"""Runs and checkpoints that the tests of cards, exports and pushes share; built once per session by conftest."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from conftest import make_rows
from helpers import SHORT_PROMPTS, AsksFirst
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from vt_trl.envs.resize import ResizeEnv
from vt_trl.generation.base import SamplingSettings
from vt_trl.recipe import parse_recipe
from vt_trl.run import make_trainer, train

TOKEN = "tok-abcdefghijklmnop"  # not of a shape that anything would recognise as a token
ACCURACIES = {1: 0.5, 2: 1.0, 3: 0.0}  # by step; the best is neither the first nor the last


def write_rows(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for number, row in enumerate(make_rows(count, size=(112, 112))):
        row["image"].save(folder / f"{number}.png")
        lines.append(json.dumps(row | {"image": f"{number}.png"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def write_recipe(root: Path, checkpoint: Path, **settings) -> Path:
    """A recipe next to its rows; ``root / "out"`` is its output folder."""
    if not (root / "rows").exists():
        write_rows(root / "rows", 4)
    values = {
        "model": str(checkpoint),
        "dataset": str(root / "rows"),
        "output_dir": str(root / "out"),
        "dtype": "float32",
        "environment_args": {"prompts": SHORT_PROMPTS, "min_pixels": 3136},
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_turn_tokens": 6,
        "max_completion_length": 128,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "mask_truncated_completions": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | settings
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def scripted(completion_ids, trainer_state, **_) -> list[float]:
    """Accuracy as in ACCURACIES over four rows; in training whatever makes groups differ."""
    share = ACCURACIES.get(trainer_state.global_step, 0.0)
    return [float((index + 1) / len(completion_ids) <= share) for index in range(len(completion_ids))]


def spread(completion_ids, **_) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def finish(checkpoint: Path, root: Path, *overrides: str, **settings) -> SimpleNamespace:
    """A run by its recipe: evaluated after each of three steps, two checkpoints kept, the best loaded at the end."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": str(root / "rows"),
        "metric_for_best_model": "eval_accuracy",
        "load_best_model_at_end": True,
        "hub_token": TOKEN,
    } | settings
    recipe = write_recipe(root, checkpoint, **settings)
    seen = {}
    trainer = train(recipe, overrides, reward_funcs=[scripted, spread], environment=AsksFirst_, callbacks=[Keep(seen)])
    return SimpleNamespace(out=root / "out", trainer=trainer, seen=seen, root=root)


def Keep(seen: dict[int, dict[str, torch.Tensor]]):  # noqa: N802
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        """Weights after every step."""

        def on_step_end(self, args, state, control, model, **_):
            seen[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    return Callback()


def AsksFirst_():  # noqa: N802
    return AsksFirst(prompts=SHORT_PROMPTS, min_pixels=3136)


def make_caller(folder: Path) -> Path:
    """Layers that add nothing, so that the next token hangs on the last alone: a placeholder, else a tool call."""
    from vt_trl.tiny import build_tiny

    build_tiny(folder, hidden_size=64)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "visual" not in name and ("o_proj" in name or "down_proj" in name):
            value.zero_()
    table = next(value for name, value in weights.items() if "embed_tokens" in name)
    last = table[tokenizer("assistant\n")["input_ids"][-1]]
    for token, scale in (("<tool_call>", 3), ("<|image_pad|>", 6)):
        table[tokenizer.convert_tokens_to_ids(token)] = scale * last
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untrained(checkpoint: Path, root: Path, environment=ResizeEnv, **settings):
    """The trainer of a recipe, as it is before the first step."""
    recipe = write_recipe(root, checkpoint, **settings)
    run, args = parse_recipe(recipe)
    trainer = make_trainer(run, args, environment=lambda: environment(prompts=SHORT_PROMPTS, min_pixels=3136))
    trainer.note_keeper.describe(yaml.safe_load(recipe.read_text()), run)
    return trainer


def greedy(trainer, rows) -> list:
    """Rollouts of the policy, greedy in every turn."""
    trainer.model.eval()
    trainer.features.clear()
    return trainer.runner.run(rows, 1, SamplingSettings(temperature=0.0))


@torch.no_grad()
def replay(model, processor, settings, rollout) -> list[tuple[int, ...]]:
    """What plain transformers writes in each turn of a rollout, given the same tokens and pictures before it."""
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids, masks, said = rollout.prompt_ids + rollout.completion_ids, [0] * len(rollout.prompt_ids), []
    masks += rollout.loss_mask
    starts = [at for at in range(1, len(ids)) if masks[at] and not masks[at - 1]]
    for turn, (start, sampled) in enumerate(zip(starts, rollout.turns, strict=True)):
        before = torch.tensor([ids[:start]])
        pictures = processor.image_processor(images=rollout.images[: turn + 1], return_tensors="pt")
        settings.max_new_tokens = len(sampled.token_ids)
        out = model.generate(
            input_ids=before,
            attention_mask=torch.ones_like(before),
            mm_token_type_ids=(before == image_id).int(),
            **pictures,
            generation_config=settings,
        )
        said.append(tuple(out[0, start:].tolist()))
    return said


@torch.no_grad()
def logits(model, processor, rollout, banned=()) -> torch.Tensor:
    """(L, vocabulary) of a whole rollout, without the banned tokens."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pictures = processor.image_processor(images=rollout.images, return_tensors="pt")
    kinds = (ids == image_id).int()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pictures).logits[0]
    allowed = [one for one in range(out.size(1)) if one not in set(banned)]
    return out[:, allowed]
