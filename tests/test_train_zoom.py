"""A step of training with boxes inside the reasoning, on tiny checkpoints of both families."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILY_NAMES, make_rows, picture
from datasets import Dataset
from test_trainer import inputs_of, make_trainer
from transformers import AutoProcessor

from vt_trl.errors import ConfigError
from vt_trl.evaluation.rows import play_rows
from vt_trl.families import family_of
from vt_trl.generation.base import Sample, ScriptedBackend
from vt_trl.inference import PolicyModel
from vt_trl.passes import completion_logprobs
from vt_trl.pipeline import VisionThinkPipeline
from vt_trl.policies import parse_policy

BOXES = {"qwen2_5_vl": "[0, 0, 56, 112]", "qwen3_vl": "[0, 0, 500, 1000]"}  # the left half, as the family writes it


class Talks:
    """Member 0 looks and is right, 1 looks outside and is right, 2 answers at once, 3 looks and is wrong."""

    def __init__(self, tokenizer, family: str):
        self.tokenizer, self.family = tokenizer, family
        self.turns: dict[int, int] = {}

    def texts(self, member: int, gold: str) -> list[str]:
        good, bad = BOXES[self.family], "[0, 0, 5000, 9]"
        end = f" so</think><answer>{gold}</answer>"
        look = '<think>See {"bbox_2d": '
        return [
            [f"{look}{good}}}", end],
            [f"{look}{bad}}}", end],
            [f"<think>It is {{1}} so</think><answer>{gold}</answer>"],
            [f"{look}{good}}}", " so</think><answer>no</answer>"],
        ][member]

    def __call__(self, request) -> Sample:
        member, group = request.request_id % 4, request.request_id // 4
        turn = self.turns.get(request.request_id, 0)
        self.turns[request.request_id] = turn + 1
        texts = self.texts(member, str(group))
        ids = self.tokenizer(texts[turn], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = (*ids, self.tokenizer.eos_token_id) if turn == len(texts) - 1 else tuple(ids)
        assert request.stop == ("}",)
        return Sample(request.request_id, ids, (None,) * len(ids), finished=True)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_step_with_looks_inside_the_reasoning(checkpoints, tmp_path, family):
    tokenizer = AutoProcessor.from_pretrained(checkpoints[family]).tokenizer
    trainer = make_trainer(
        checkpoints[family],
        tmp_path,
        environment_args={"shape": "inline", "turns": 3},
        backend=ScriptedBackend(Talks(tokenizer, family)),
        reward_preset="paper",
        penalty="none",
        max_turn_tokens=400,
        max_completion_length=4000,
        environment_name="zoom",
    )
    sight = trainer.runner.environment().sight
    assert sight == family_of(trainer.model.config).sight(trainer.processing_class.image_processor)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs_of(trainer, 1))
    looked, outside, direct, wrong = trainer.last_rollouts
    assert looked.regions == wrong.regions and looked.regions[0].box == (0, 0, 56, 112)
    assert [len(one.images) for one in trainer.last_rollouts] == [2, 1, 1, 2]
    assert [one.value for one in outside.faults] == ["box_outside"]
    parts = [record.parts for record in trainer.recorder.last_records]
    assert [part["accuracy"] for part in parts] == [1, 1, 1, 0]
    assert [part["format"] for part in parts] == [1, 0, 1, 1]
    assert [part["region"] for part in parts] == [0.5, 0, 0, 0]
    # "See" and "so": two segments of 3 + 2 characters; "It is {1} so" has 12.
    assert [part["length_paper"] for part in parts] == pytest.approx([0.005, 0.005, 0.012, 0.005])
    # What is trained on is what was said: no picture, no sentence of ours, one turn.
    for row, rollout in enumerate(trainer.last_rollouts):
        kept = batch["completion_ids"][row][batch["tool_mask"][row].bool()]
        said = "".join(turn.text for turn in rollout.turns)
        assert tokenizer.decode(kept) == said + tokenizer.eos_token
    with torch.no_grad():
        assert completion_logprobs(trainer, trainer.model, batch, chunk=2).isfinite().all()


def test_a_model_is_made_ready_for_the_pictures_of_its_policy(checkpoint, monkeypatch):
    """The backend is loaded for the first policy; another that shows more pictures cannot follow on vLLM."""
    model = PolicyModel(checkpoint, max_turn_tokens=4, max_completion_length=500)
    look = parse_policy("look").environment({"turns": 3, "min_pixels": 784}, model.sight)
    row = make_rows(1, (112, 56))[0] | {"images": [picture(1, (112, 56)), picture(2, (56, 112))]}
    evaluated = play_rows(model.runner(look), Dataset.from_list([row]), model.sampling)
    (rollout,) = evaluated.rollouts
    assert model.max_images == 4 + 3 - 1 and [image.size for image in rollout.images] == [(56, 28), (28, 56)]
    assert look().sight == model.sight
    zoom = parse_policy("zoom").environment(None, model.sight)
    model.runner(zoom)  # transformers takes what comes
    monkeypatch.setattr(PolicyModel, "uses_vllm", True)
    with pytest.raises(ConfigError, match="shows up to 8 pictures.*vLLM was started for 6"):
        model.runner(zoom)


@pytest.mark.parametrize("shape", ["tool_call", "inline"])
def test_the_pipeline_plays_a_policy_that_looks(checkpoint, shape):
    """A random model looks at nothing; what counts is that its turns end where they should, and as what."""
    arguments = {"shape": shape, "turns": 3}
    pipe = VisionThinkPipeline(checkpoint, policy="zoom", environment_args=arguments, max_turn_tokens=6)
    result = pipe(image=picture(1, (112, 112)), question="What?")
    assert result.status in ("truncated", "no_answer") and result.visual_tokens == 16
    assert len(result.turns) == 1 and result.generated_tokens <= 6
