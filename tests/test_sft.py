"""SFT on traces: tokens are those of a rollout, loss is on the replies alone, and a few steps teach them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FAMILY_NAMES, picture
from helpers import CALL, SHORT_PROMPTS, Script, answer, png
from helpers import row as stored_row
from safetensors.torch import load_file
from shipped import RECIPES, kind_of
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from benchmarks.judge_server import JudgeServer, content
from data_prep import traces
from data_prep.writers import HINTS
from vt_trl import cli
from vt_trl.chat import ChatEncoder
from vt_trl.checkpoints import last_checkpoint, problem_with
from vt_trl.data import load_rows
from vt_trl.dialogue import Demonstration, collate, demonstrate, replay
from vt_trl.envs import ResizeEnv, make_environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.export import export
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import SamplingSettings, ScriptedBackend
from vt_trl.generation.standalone import make_runner
from vt_trl.recipe import parse_recipe
from vt_trl.resume import TERMINATED
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.sft import TraceCollator, VTSFTConfig, make_sft_trainer, played, require_teachable, sft
from vt_trl.types import RolloutStatus

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"min_pixels": 3136, "prompts": SHORT_PROMPTS}
ROUTES = [[CALL, answer("7")], [answer("7")]]


def encoder_of(checkpoint: Path) -> ChatEncoder:
    processor = AutoProcessor.from_pretrained(checkpoint)
    family = family_of(AutoConfig.from_pretrained(checkpoint))
    return ChatEncoder(processor.tokenizer, family, ImageFeatures(processor.image_processor))


def row(**changes) -> dict:
    return {"id": "a", "image": picture(1, (112, 56)), "question": "Which number?", "answer": ["7"]} | changes


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("replies", ROUTES, ids=["asked", "direct"])
def test_tokens_are_those_of_the_rollout(checkpoints, family, replies):
    """The same replies through the rollout loop: equal ids, equal masks, the same pictures."""
    encoder = encoder_of(checkpoints[family])
    stop = encoder.tokenizer.convert_tokens_to_ids(encoder.family.turn_end)
    backend = ScriptedBackend(Script(encoder.tokenizer, lambda member, turn: replies[turn]))
    (rollout,) = RolloutRunner(lambda: ResizeEnv(**SMALL), backend, encoder, [stop], Limits(500, 4000)).run(
        [row()], 1, SamplingSettings()
    )
    assert rollout.status is RolloutStatus.ANSWERED and rollout.asked == (len(replies) == 2)
    trace = demonstrate(replay(ResizeEnv(**SMALL), row(), replies), encoder)
    assert trace.token_ids == [*rollout.prompt_ids, *rollout.completion_ids]
    assert trace.loss_mask == [0] * len(rollout.prompt_ids) + rollout.loss_mask
    assert [image.tobytes() for image in trace.images] == [image.tobytes() for image in rollout.images]


def test_loss_is_on_the_replies_alone(checkpoint):
    """The trained tokens read the replies and their stop tokens, and no tool text, no placeholder is among them."""
    encoder = encoder_of(checkpoint)
    trace = demonstrate(replay(ResizeEnv(**SMALL), row(), ROUTES[0]), encoder)
    trained = [token for token in trace.labels if token != -100]
    assert encoder.tokenizer.decode(trained) == f"{CALL}<|im_end|>{answer('7')}<|im_end|>"
    image_id = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert trace.token_ids.count(image_id) == 2 + 8 and image_id not in trained


class FakeFeatures:
    def batch(self, images):
        return {"pixel_values": torch.tensor(images)}


def test_a_batch_of_integers():
    """
    ::
        first   5 90 90 6 | 7 99 | 8 90 9 | 4 99     second  5 90 6 | 3 99
        loss                1  1              1  1                    1  1
    """
    first = Demonstration([5, 90, 90, 6, 7, 99, 8, 90, 9, 4, 99], [0] * 4 + [1] * 2 + [0] * 3 + [1] * 2, [1, 2])
    second = Demonstration([5, 90, 6, 3, 99], [0, 0, 0, 1, 1], [3])
    batch = collate([first, second], FakeFeatures(), pad_id=0, image_token_id=90)
    assert batch["input_ids"].tolist() == [[5, 90, 90, 6, 7, 99, 8, 90, 9, 4, 99], [5, 90, 6, 3, 99] + [0] * 6]
    ignored = -100
    assert batch["labels"].tolist() == [
        [ignored] * 4 + [7, 99] + [ignored] * 3 + [4, 99],
        [ignored] * 3 + [3, 99] + [ignored] * 6,
    ]
    assert batch["attention_mask"].sum(1).tolist() == [11, 5]
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0], [0, 1] + [0] * 9]
    assert batch["pixel_values"].tolist() == [1, 2, 3]  # in the order of their placeholders


def test_what_is_not_trained_has_no_part_in_the_loss(checkpoint):
    """Negative control: labels elsewhere change the loss of the same forward; those under the mask are ignored."""
    encoder = encoder_of(checkpoint)
    collator = TraceCollator(make_environment("resize", SMALL), encoder, pad_id=0)
    batch = collator([row(replies=ROUTES[0])])
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(**batch)
    logp = torch.log_softmax(output.logits[0, :-1].float(), -1)
    targets, kept = batch["input_ids"][0, 1:], batch["labels"][0, 1:] != -100
    each = -logp.gather(1, targets[:, None])[:, 0]
    assert output.loss.item() == pytest.approx(each[kept].mean().item(), rel=1e-5)
    assert abs(output.loss.item() - each.mean().item()) > 1e-3  # the loss over all tokens is another one
    assert 0 < kept.sum() < len(kept)


def test_traces_that_cannot_be_taught_name_their_row(checkpoint):
    encoder = encoder_of(checkpoint)
    collator = TraceCollator(make_environment("resize", SMALL), encoder, pad_id=0)
    with pytest.raises(DataError, match="id 'a'.*still open"):
        collator([row(replies=[CALL])])


@pytest.mark.parametrize("name", ["sft_lora.yaml", "sft_full.yaml", "vlm_r3_sft.yaml"])
def test_recipes_parse(name):
    run, args = parse_recipe(ROOT / "recipes" / name, ["--use_cpu", "true", "--bf16", "false"], VTSFTConfig)
    given = yaml.safe_load((ROOT / "recipes" / name).read_text())
    assert (run.lora, args.learning_rate) == (given.get("lora", "none"), given["learning_rate"])
    assert args.environment_args == given["environment_args"] and args.remove_unused_columns is False
    with pytest.raises(ConfigError, match="A recipe with max_length is for `vt-trl sft`, so run that"):
        parse_recipe(ROOT / "recipes" / name, ["--use_cpu", "true", "--bf16", "false"])


@pytest.mark.parametrize(
    "path", [one for one in RECIPES if kind_of(one) is not VTSFTConfig], ids=lambda path: path.stem
)
def test_recipes_of_grpo_are_sent_to_their_command(path):
    with pytest.raises(ConfigError, match="A recipe with .*num_generations.* is for `vt-trl train`, so run that"):
        parse_recipe(path, (), VTSFTConfig)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("packing: true", "packing.*no effect"),
        ("max_length: 0", "max_length is 0"),
        ("on_too_long: cut", "on_too_long is 'cut'"),
        ("environment: resise", "Did you mean 'resize'"),
        ("num_generations: 4", "Unknown setting.*num_generations"),
    ],
)
def test_settings_that_cannot_work(tmp_path, line, words):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: x\ndataset: y\nuse_cpu: true\nbf16: false\n{line}\n")
    with pytest.raises(ConfigError, match=words):
        parse_recipe(recipe, (), VTSFTConfig)


@pytest.fixture
def recipe(tmp_path, checkpoint, monkeypatch) -> Path:
    """Four traces of both routes, written through the client by a server on this machine, and a recipe for them."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    rows, out = tmp_path / "rows", tmp_path / "traces"
    rows.mkdir()
    lines = []
    for number in range(4):
        (rows / f"{number}.png").write_bytes(png((40 * number, 0, 0), (56, 56)))
        one = {"id": f"t{number}", "image": f"{number}.png", "question": "Which number?", "answer": "7"}
        lines.append(json.dumps(one | {"needs_full": number % 2 == 0}))
    (rows / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def script(request):
        said = json.dumps(request.body["messages"])
        return content(CALL if HINTS[True][:40] in said and said.count('image_url": {') == 1 else answer("7"))

    with JudgeServer(script) as server:
        words = ["--dataset", rows, "--out", out, "--model", "strong", "--environment-args", json.dumps(SMALL)]
        words += ["--endpoint-args", json.dumps({"base_url": server.base_url})]
        traces.run(traces.parser().parse_args([str(word) for word in words]))
    settings = {
        "model": str(checkpoint), "dataset": str(out), "output_dir": str(tmp_path / "out"), "dtype": "float32",
        "environment_args": SMALL, "per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_a_few_steps_lower_the_loss_and_the_result_can_be_rolled_out(recipe, tmp_path):
    assert sorted(load_rows(tmp_path / "traces")["replies"]) == sorted(ROUTES * 2)
    trainer = sft(recipe)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    runner = make_runner(model, processor, lambda: ResizeEnv(**SMALL), Limits(48, 400))
    found = runner.run([row(image=picture(3, (56, 56)))], 2, SamplingSettings(seed=1))
    assert len(found) == 2 and all(rollout.turns for rollout in found)


SAVING = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4")


def losses(trainer) -> dict[int, tuple]:
    return {log["step"]: (log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log}


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(recipe, tmp_path):
    """From the newest complete checkpoint, with its weights: to the bit, and not from the start again."""
    whole = sft(recipe, SAVING)
    for step in (2, 4):
        assert problem_with(tmp_path / "out" / f"checkpoint-{step}") is None
    assert problem_with(tmp_path / "out") is None  # the model is listed as whole
    (tmp_path / "out" / "checkpoint-4" / "model.safetensors").unlink()  # as if killed while it was written
    again = sft(recipe, [*SAVING, "--resume_from_checkpoint", "true"])
    assert losses(again) == losses(whole) and len(losses(whole)) == 4
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    done = sft(recipe, [*SAVING, "--resume_from_checkpoint", "true"])  # killed after the last step
    assert done.state.global_step == 4 and losses(done) == losses(whole)


class Terminated(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_a_checkpoint_and_ends_with_143(recipe, tmp_path, monkeypatch):
    trainer = sft(recipe, callbacks=[Terminated()])
    assert trainer.state.global_step == 2 and last_checkpoint(tmp_path / "out").name == "checkpoint-2"
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr("vt_trl.sft.sft", lambda *_: trainer)
    assert cli.main(["sft", str(recipe)]) == TERMINATED


def test_a_fine_tuned_model_is_exported(recipe, tmp_path):
    sft(recipe, ["--lora", "language", "--lora_r", "4", *SAVING])
    out = export(tmp_path / "out", merge=True, out=tmp_path / "merged")
    weights = load_file(out / "model.safetensors")
    assert not any("lora" in name for name in weights) and (out / "README.md").is_file()
    AutoModelForImageTextToText.from_pretrained(out)


def test_adapters_and_frozen_towers(recipe):
    trainer = sft(recipe, ["--lora", "language", "--lora_r", "4", "--max_steps", "2"])
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trained and all("lora" in name and ".visual." not in name for name in trained)


def test_rows_without_replies_are_no_traces(recipe, tmp_path, folder):
    rows = folder({"id": "a", "image": "images/0.png", "question": "What?", "answer": "1"})
    with pytest.raises(DataError, match="no column `replies`"):
        sft(recipe, ["--dataset", str(rows)])
    lines = [{"id": "a", "image": "images/0.png", "question": "What?", "answer": "1", "replies": []}]
    with pytest.raises(DataError, match="row 0.*replies is empty"):
        sft(recipe, ["--dataset", str(folder(*lines, name="data.jsonl"))])


def test_long_traces_are_named_before_the_run_or_left_out(recipe, tmp_path, checkpoint, caplog, monkeypatch):
    """t0 and t2 ask for the full picture and are therefore longer than t1 and t3; the limit lies between."""
    encoder, shown = encoder_of(checkpoint), load_rows(tmp_path / "traces")
    environment = make_environment("resize", SMALL)
    lengths = {one["id"]: len(demonstrate(played(one, environment), encoder).token_ids) for one in shown}
    assert lengths["t0"] == lengths["t2"] > lengths["t1"] == lengths["t3"]
    limit = ["--max_length", str(lengths["t1"])]
    with pytest.raises(DataError) as error, monkeypatch.context() as patch:
        patch.setattr("vt_trl.sft.VTSFTTrainer", None)  # nothing is loaded before
        sft(recipe, limit)
    words = f"2 of 4 rows are longer than max_length ({lengths['t1']} tokens; the longest has {lengths['t0']})"
    assert words in str(error.value) and f"row 0 (id 't0'): too long: {lengths['t0']} tokens" in str(error.value)
    args = make_args(recipe, [*limit, "--on_too_long", "skip"])
    assert make_sft_trainer(*args).train_dataset["id"][:] == ["t1", "t3"]
    assert words in caplog.text and "{'too long': 2}" in caplog.text
    with pytest.raises(DataError, match="No row is left"):
        make_sft_trainer(*make_args(recipe, ["--max_length", "9", "--on_too_long", "skip"]))


def make_args(recipe: Path, overrides: list[str]) -> tuple:
    return parse_recipe(recipe, overrides, VTSFTConfig)


def test_replies_that_are_no_episode_are_bad_rows_before_the_run(checkpoint, folder):
    replies = [ROUTES[1], [CALL]]
    lines = [stored_row(number, answer="7") | {"replies": said} for number, said in enumerate(replies)]
    encoder, environment = encoder_of(checkpoint), make_environment("resize", SMALL)
    rows = load_rows(folder(*lines))
    with pytest.raises(DataError, match="1 of 2 rows are no traces.*\n.*row 1 .id 'r1'.: the dialogue is still open"):
        require_teachable(rows, environment, encoder, "error", None, "error")
    assert require_teachable(rows, environment, encoder, "skip", None, "error")["id"][:] == ["r0"]
