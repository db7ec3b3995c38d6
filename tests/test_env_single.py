"""One turn at full size within a bound of pixels, and the rewards that go with it, worked out by hand."""

from __future__ import annotations

import json

import pytest
from helpers import Script
from PIL import Image
from test_trainer import inputs_of, make_trainer
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLConfig

from vt_trl.chat import ChatEncoder
from vt_trl.commands import serve
from vt_trl.config import VTGRPOConfig
from vt_trl.dialogue import replay
from vt_trl.envs import ENVIRONMENTS, DirectEnv, SingleEnv, make_environment
from vt_trl.errors import ConfigError, DataError
from vt_trl.evaluation.run import Plan, evaluate
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation.base import SamplingSettings, ScriptedBackend
from vt_trl.pipeline import VisionThinkPipeline
from vt_trl.policies import parse_policy, trained_policy, trained_settings
from vt_trl.preflight.counts import widths
from vt_trl.preflight.episodes import PixelLimits, longest_episode
from vt_trl.rewards import make_reward, make_rewards
from vt_trl.rewards.reasoned import reasoned_reward
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.run_notes import environment_facts
from vt_trl.sft import TraceCollator
from vt_trl.types import Done, Fault, RolloutStatus


def settings(folder, **more) -> VTGRPOConfig:
    return VTGRPOConfig(output_dir=str(folder), use_cpu=True, **more)


def row(size=(2000, 1000)) -> dict:
    return {"id": "a", "image": Image.new("RGB", size), "question": "How many?", "answer": ["5"]}


def test_it_shows_the_whole_picture_within_the_bound_and_offers_no_tool():
    opening = SingleEnv().reset(row())
    (image,) = opening.messages[-1].images
    assert image.size == (724, 362) or abs(image.width / image.height - 2) < 0.02
    assert 250_000 < image.width * image.height <= 262_144
    assert "tool" not in " ".join(message.text for message in opening.messages)
    small = SingleEnv().reset(row((112, 56))).messages[-1].images[0]
    assert small.size == (112, 56)  # not enlarged, as environment `direct` would
    assert DirectEnv().reset(row((112, 56))).messages[-1].images[0].size != small.size
    assert SingleEnv(max_pixels=50_176).reset(row((1000, 1000))).messages[-1].images[0].size == (224, 224)


def test_every_gold_route_ends_with_full_marks():
    environment = SingleEnv()
    ends = environment.validate(row())
    assert ends == [Done(RolloutStatus.ANSWERED, answer="5")] and environment.max_turns == environment.max_images == 1
    replay(SingleEnv(), row(), ["<think>1 + 4</think><answer>5</answer>"])
    with pytest.raises(DataError, match="malformed"):
        replay(SingleEnv(), row(), ["5"])
    call = '<think>x</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
    assert SingleEnv().step(call).status is RolloutStatus.TURN_LIMIT
    assert SingleEnv().step("<think>cut", truncated=True).faults == (Fault.TRUNCATED,)


def test_it_is_known_by_name_wherever_a_policy_is(tmp_path):
    assert isinstance(make_environment("single", {"max_pixels": 50_176})(), SingleEnv)
    with pytest.raises(ConfigError, match="environment: direct"):
        ENVIRONMENTS["single"](resolution="low")
    args = settings(tmp_path, environment="single", reward_preset="openvlthinker", penalty="none")
    facts = environment_facts(SingleEnv(max_pixels=50_176), args)
    policy = trained_policy(facts)
    assert policy is parse_policy("single") and not policy.has_tool
    played = policy.environment(trained_settings(policy, facts))()
    assert isinstance(played, SingleEnv) and played.max_image_pixels == 50_176


def test_the_preflight_counts_one_turn_and_one_picture(tmp_path):
    """512 x 512 is the largest square within 262,144 pixels: multiples of 28 and of 2 make it 504, 18 x 18 tokens."""
    args = settings(
        tmp_path,
        environment="single",
        penalty="none",
        reward_preset="openvlthinker",
        max_completion_length=64,
    )
    episode = longest_episode(args, widths(Qwen2_5_VLConfig()), PixelLimits())
    assert (episode.turns, episode.images, episode.reply_images) == (1, 1, 0)
    assert episode.prompt_visual == 18 * 18 and episode.sampled == 64


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("reply", "total"),
    [
        ("<think>2 and 3 are 5.</think><answer>5</answer>", 1.0),
        ("<think></think><answer>5</answer>", 0.5),
        ("<think> \n </think>\n<answer>5</answer>", 0.5),
        ("<think></think>2 and 3 are 5.<answer>5</answer>", 1.0),
        ("<answer>5</answer>", 0.5),
        ("<answer>5</answer> because 2 and 3 are 5.", 0.5),
        ("<think>2 and 3 are 6.</think><answer>6</answer>", 0.0),
        ("<think></think><answer>6</answer>", 0.0),
        ("5", 0.0),
    ],
)
def test_the_preset_pays_one_for_right_half_without_reasoning_and_nothing_for_form(tmp_path, reply, total):
    args = settings(tmp_path, reward_preset="openvlthinker", penalty="none", environment="single")
    assert args.rewards == ["accuracy", "reasoned", "format"] and args.reward_weights == [0.5, 0.5, 0.0]
    functions = [make_reward(name) for name in args.rewards]
    scores = [one(completions=[said(reply)], answer=[["5"]])[0] for one in functions]
    assert sum(weight * score for weight, score in zip(args.reward_weights, scores, strict=True)) == total


def test_a_judge_decides_and_the_penalty_is_refused(tmp_path):
    """The inner function does not look at the answer: the trainer keeps it for what its judge calls right."""
    assert reasoned_reward([said("<think>so</think><answer>five</answer>")], answer=[["5"]]) == [0.0]
    assert reasoned_reward([said("<think>so</think><answer>five</answer>")], correct=[True]) == [1.0]
    args = settings(tmp_path, reward_preset="openvlthinker", penalty="none", environment="single", judge="rule")
    _, reasoned, _ = make_rewards(args)
    assert reasoned.only_when_right and reasoned([said("<think>so</think><answer>five</answer>")]) == [1.0]
    with pytest.raises(ConfigError, match="penalty: none"):
        settings(tmp_path, reward_preset="openvlthinker", environment="single")


MEMBERS = (
    "<think>Three and two are {gold}.</think><answer>{gold}</answer>",
    "<think></think><answer>{gold}</answer>",
    "<think>Three and two are six.</think><answer>six</answer>",
    "{gold}",
)


def test_it_trains_with_the_preset_and_the_form_is_logged_but_pays_nothing(checkpoint, tmp_path):
    """Rewards 1, 0.5, 0, 0. The format of the four is 1, 0, 1, 0."""
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    trainer = make_trainer(
        checkpoint,
        tmp_path,
        backend=ScriptedBackend(Script(tokenizer, lambda member, turn: MEMBERS[member].format(gold=0))),
        environment_name="single",
        environment_args={"max_pixels": 12_544},
        reward_preset="openvlthinker",
        penalty="none",
        max_turn_tokens=200,
        max_completion_length=200,
    )
    trainer.model.train()
    trainer._generate_and_score_completions(inputs_of(trainer, 1))
    records = trainer.recorder.last_records
    assert [one.reward for one in records] == [1.0, 0.5, 0.0, 0.0]
    assert [one.correct for one in records] == [True, True, False, False]
    assert [one.parts for one in records] == [
        {"accuracy": 1.0, "reasoned": 1.0, "format": 1.0},
        {"accuracy": 1.0, "reasoned": 0.0, "format": 0.0},
        {"accuracy": 0.0, "reasoned": 0.0, "format": 1.0},
        {"accuracy": 0.0, "reasoned": 0.0, "format": 0.0},
    ]
    assert all(len(one.images) == len(one.turns) == 1 and not one.asked for one in trainer.last_rollouts)


def test_a_trace_of_it_is_taught_as_it_would_be_sampled(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    family = family_of(AutoConfig.from_pretrained(checkpoint))
    encoder = ChatEncoder(processor.tokenizer, family, ImageFeatures(processor.image_processor))
    environment, reply = make_environment("single", {"max_pixels": 12_544}), MEMBERS[0].format(gold=5)
    backend = ScriptedBackend(Script(encoder.tokenizer, lambda member, turn: reply))
    stop = [encoder.tokenizer.convert_tokens_to_ids(family.turn_end)]
    (rollout,) = RolloutRunner(environment, backend, encoder, stop, Limits(200, 200)).run(
        [row()], 1, SamplingSettings()
    )
    batch = TraceCollator(environment, encoder, 0)([row() | {"replies": [reply]}])
    assert batch["input_ids"][0].tolist() == [*rollout.prompt_ids, *rollout.completion_ids]
    assert (batch["labels"][0] != -100).tolist() == [False] * len(rollout.prompt_ids) + [True] * len(
        rollout.completion_ids
    )


def test_it_is_evaluated_asked_and_served_by_name(checkpoint, rows, tmp_path):
    plan = Plan(
        models={"tiny": str(checkpoint)},
        data={"rows": str(saved(rows, tmp_path))},
        policies=["single"],
        environment_args={"max_pixels": 12_544},
        model_settings={"max_turn_tokens": 4},
    )
    (cell,) = evaluate(plan, tmp_path / "evaluation")["cells"]
    assert (cell["policy"], cell["request_rate"], cell["rows"]) == ("single", None, 4)
    pipeline = VisionThinkPipeline(
        str(checkpoint), policy="single", max_turn_tokens=4, environment_args={"max_pixels": 12_544}
    )
    result = pipeline(image=rows[0]["image"], question="How many?")
    assert pipeline.policy == "single" and not result.asked and len(result.turns) == 1
    assert serve.parser().parse_args([str(checkpoint), "--policy", "single"]).policy == "single"


def saved(rows, folder):
    """Rows as a folder of files."""
    place = folder / "rows"
    place.mkdir()
    lines = []
    for number, one in enumerate(rows):
        one["image"].save(place / f"{number}.png")
        lines.append(json.dumps(one | {"image": f"{number}.png"}))
    (place / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place
