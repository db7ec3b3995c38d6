"""The plug-in in the real lmms-eval: found by its entry point, on local tasks with local pictures and a tiny model.

lmms-eval is no part of the test set-up, because of its own pins; CONTRIBUTING.md says how to run this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import picture
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from helpers import CALL, SHORT_PROMPTS, Script, answer
from test_env_zoom import call

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from loguru import logger  # noqa: E402

from vt_trl import VisionThinkPipeline  # noqa: E402
from vt_trl.errors import ConfigError  # noqa: E402
from vt_trl.generation.base import ScriptedBackend  # noqa: E402
from vt_trl.integrations.player import Player  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ARGS = {"prompts": SHORT_PROMPTS, "min_pixels": 3136}
SETTINGS = {"device": "cpu", "max_turn_tokens": 6, "environment_args": json.dumps(ARGS)}
ASKS_FIRST = "helpers:AsksFirst"  # a random model gives no answer in tags; this environment takes what it says
TASK = """
task: vt_local
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 1, until: ["\\n"], temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
UTILS = """
def visuals(doc):
    return [image.convert("RGB") for image in doc["images"]]
"""
SEEN = """
from helpers import CALL
from vt_trl.envs import ResizeEnv
from vt_trl.envs.base import pictures_of
from vt_trl.types import Done, RolloutStatus


class Seen(ResizeEnv):  # a random model gives no answer; this says what the row showed
    def reset(self, row):
        self.said = f"{row['question']} {[image.getpixel((0, 0))[0] for image in pictures_of(row)]}"
        return super().reset(row)

    def step(self, reply, truncated=False):
        return super().step(CALL) if self.turn == 0 else Done(RolloutStatus.ANSWERED, answer=self.said)
"""


def documents() -> list[dict]:
    """One picture, one picture, two pictures, a text alone."""
    shown = [[picture(0)], [picture(1)], [picture(2), picture(3)], []]
    return [{"images": one, "question": f"Which is {n}?", "answer": str(n)} for n, one in enumerate(shown)]


@pytest.fixture
def said():
    """What the plug-in logs."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO", format="{message}")
    yield lines
    logger.remove(sink)


@pytest.fixture
def make(checkpoint):
    def build(reply=None, **settings):
        lm = get_model("vt_trl")(pretrained=str(checkpoint), **SETTINGS | settings)
        lm.task_dict["local"] = {"test": documents()}
        if reply is not None:
            tokenizer = lm.player.model.parts.tokenizer
            script = Script(tokenizer, lambda index, turn: "")

            def play(request):
                script.choose = lambda index, turn: reply(index, tokenizer.decode(request.token_ids))
                return script(request)

            lm.player.model.__dict__["backend"] = ScriptedBackend(play)  # in place of the cached property
        return lm

    return build


def requests(*numbers: int, content=None, **settings) -> list[Instance]:
    def messages(doc):
        images = [{"type": "image", "url": one} for one in doc["images"]]
        return [{"role": "user", "content": content or [*images, {"type": "text", "text": doc["question"]}]}]

    return [
        Instance(
            "generate_until",
            ("context", messages, settings, number, "local", "test"),
            0,
            {"task": "local", "doc_id": number, "repeats": 1},
        )
        for number in numbers
    ]


def texts(results) -> list[str]:
    return [one.text for one in results]


def test_the_entry_point_is_found_and_speaks_the_chat_interface():
    assert get_model("vt_trl").__module__ == "vt_trl.integrations.lmms_model"
    assert get_model("vt_trl", force_simple=True).is_simple is False


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_answers_come_without_tags_in_order_and_counted(make, said, batch_size):
    lm = make(
        lambda index, context: answer("\\boxed{seen}") if "Full:" in context else CALL,
        batch_size=batch_size,
        max_turn_tokens=99,
    )
    results = lm.generate_until(requests(0, 2, max_new_tokens=1, until=["\n"]))
    assert texts(results) == ["seen", "seen"]
    assert lm.player.tally.asked == 2 and lm.player.tally.visual_tokens == [4 + 16, 2 * (4 + 16)]
    assert results[0].token_counts.output_tokens == lm.player.tally.generated_tokens // 2
    lifted = [line for line in said if "this is lifted" in line]
    assert len(lifted) == 1 and "max_new_tokens=1, until=['\\n']" in lifted[0]
    assert any("2 questions played (2 answered); looked again in 100.0%" in line for line in said)


def test_it_writes_what_the_pipeline_writes(make, checkpoint):
    pipe = VisionThinkPipeline(checkpoint, policy=ASKS_FIRST, device="cpu", max_turn_tokens=6, environment_args=ARGS)
    asked = [{"image": one["images"][0], "question": one["question"]} for one in documents()[:2]]
    expected = [pipe(one) for one in asked]
    assert all(len(one.pictures) == 2 and one.generated_tokens == 12 for one in expected)
    results = make(policy=ASKS_FIRST).generate_until(requests(0, 1, max_new_tokens=1))
    assert texts(results) == [one.answer.strip() for one in expected]
    assert [one.token_counts.output_tokens for one in results] == [12, 12]


def test_a_text_alone_and_several_pictures_are_played(make):
    lm = make(lambda index, context: answer(str(index)), batch_size=4, max_turn_tokens=99)
    assert texts(lm.generate_until(requests(3, 2, 0))) == ["0", "1", "2"]
    assert lm.player.tally.visual_tokens == [0, 8, 4] and not lm.player.tally.refused


@pytest.mark.parametrize("policy", ["zoom", "look"])
def test_environments_that_look_are_played_by_name(make, said, policy):
    """A box, its crop in a second turn, an answer. A picture of 112 x 112 is shown at half of each side: 4 tokens."""
    box = call([0, 0, 28, 56], image=1) if policy == "look" else call([0, 0, 28, 56])
    lm = make(
        lambda index, context: answer("seen") if "28, 56]" in context else box,
        policy=policy,
        environment_args=json.dumps({"turns": 3, "min_pixels": 3136}),
        max_turn_tokens=99,
    )
    assert lm.player.policy == policy
    assert texts(lm.generate_until(requests(0, 1))) == ["seen", "seen"]
    assert lm.player.tally.asked == 2 and all(count > 4 for count in lm.player.tally.visual_tokens)
    assert any("2 questions played (2 answered); looked again in 100.0%" in line for line in said)


def test_what_cannot_be_shown_is_empty_counted_and_said(make, said):
    lm = make(lambda index, context: answer("7"), max_pictures=1, batch_size=2, max_turn_tokens=99)
    video = requests(1, content=[{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "?"}])
    assert texts(lm.generate_until([*requests(2), *requests(0), *video])) == ["", "7", ""]
    assert len(lm.player.tally.refused) == 2
    (line,) = [line for line in said if "could not be shown" in line]
    assert "'local/test/2'" in line and "above max_pictures=1" in line and "type 'video'" in line


def test_an_environment_of_one_picture_says_so(make, said):
    lm = make(lambda index, context: answer("7"), policy="demos.reading.unreliable:UnreliableEnv", max_turn_tokens=99)
    assert texts(lm.generate_until(requests(0, 2))) == ["7", ""]
    assert any("takes one picture, and the question has 2" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": ""}, "pretrained is not set"),
        ({"polcy": "two-turn"}, "Did you mean 'policy'"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_pictures": 0}, "max_pictures is 0"),
        ({"environment_args": "{"}, "environment_args is no JSON"),
        ({"policy": "two-turns"}, "policy is 'two-turns'"),
    ],
)
def test_wrong_settings_are_named(checkpoint, settings, message):
    with pytest.raises(ConfigError, match=message):
        get_model("vt_trl")(**{"pretrained": str(checkpoint), **SETTINGS, **settings})


def test_other_requests_are_refused_and_clean_lets_go(make):
    lm = make()
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="use a task with"):
            getattr(lm, name)([])
    assert isinstance(lm.player, Player)
    lm.clean()
    assert lm.player is None


@pytest.mark.slow
def test_the_command_runs_a_local_task(checkpoint, tmp_path):
    features = Features({"images": List(Image()), "question": Value("string"), "answer": Value("string")})
    rows = documents()
    expected = [f"{row['question']} {[image.getpixel((0, 0))[0] for image in row['images']]}" for row in rows]
    for row, text in zip(rows[:3], expected, strict=False):
        row["answer"] = text  # the last row's stays wrong
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(str(tmp_path / "data"))
    task = tmp_path / "tasks"
    task.mkdir()
    (task / "vt_local.yaml").write_text(TASK.format(data=tmp_path / "data"), encoding="utf-8")
    (task / "utils.py").write_text(UTILS, encoding="utf-8")
    (tmp_path / "seen.py").write_text(SEEN, encoding="utf-8")
    args = f"pretrained={checkpoint},policy=seen:Seen,max_turn_tokens=6,environment_args={json.dumps(ARGS)}"
    out = tmp_path / "out"
    command = ["--model", "vt_trl", "--model_args", args, "--tasks", "vt_local", "--include_path", str(task)]
    command += ["--batch_size", "4", "--device", "cpu", "--log_samples", "--output_path", str(out)]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    (samples,) = out.rglob("*samples_vt_local.jsonl")
    found = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert {row["doc_id"]: row["filtered_resps"] for row in found} == dict(enumerate(expected))
    (results,) = out.rglob("*results.json")
    assert json.loads(results.read_text(encoding="utf-8"))["results"]["vt_local"]["exact_match,none"] == 0.75
    assert said.count("this is lifted") == 1
    assert "4 questions played (4 answered); looked again in 75.0%" in said
