"""The pipeline: one input, lists and batches, streaming, what it reports, and the errors it gives."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_rows, picture
from helpers import SHORT_PROMPTS, Script, answer

from vt_trl.envs import ResizeEnv
from vt_trl.errors import ConfigError, DataError
from vt_trl.generation.base import ScriptedBackend
from vt_trl.pipeline import PipelineResult, VisionThinkPipeline
from vt_trl.rollout import Limits
from vt_trl.run_notes import RunNotes, environment_facts
from vt_trl.transcripts import Transcript

ROOT = Path(__file__).resolve().parents[1]
CALLING = '<think>x</think><tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
SETTINGS = {
    "device": "cpu",
    "max_turn_tokens": 6,
    "environment_args": {"prompts": SHORT_PROMPTS, "min_pixels": 3136},
}


@pytest.fixture(scope="module")
def pipe(checkpoint) -> VisionThinkPipeline:
    """A pipeline that asks for the full picture when the question ends in an odd number, and answers "seen"."""
    pipe = VisionThinkPipeline(checkpoint, **SETTINGS)
    script = Script(pipe.model.parts.tokenizer, lambda index, turn: "")

    def reply(request):
        odd = any(f"number is {odd}?" in pipe.model.parts.tokenizer.decode(request.token_ids) for odd in (1, 3))
        script.choose = lambda index, turn: CALLING if odd and len(request.images) == 1 else answer("seen")
        return script(request)

    pipe.runner.backend = ScriptedBackend(reply)
    return pipe


def test_one_input_tells_what_it_cost(pipe):
    result = pipe(image=picture(0), question="Which number is 1?")
    assert isinstance(result, PipelineResult)
    assert (result.answer, result.status, result.asked) == ("seen", "answered", True)
    assert [one.size for one in result.pictures] == [(56, 56), (112, 112)]
    assert result.visual_tokens == 4 + 16
    assert [(turn.called, turn.answer) for turn in result.turns] == [(True, None), (False, "seen")]
    assert result.generated_tokens == sum(turn.generated_tokens for turn in result.turns)
    assert result.prompt_tokens == len(result.rollout.prompt_ids)
    direct = pipe({"image": picture(0), "question": "Which number is 0?"})
    assert (direct.asked, direct.visual_tokens, len(direct.turns)) == (False, 4, 1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_list_comes_back_in_its_order(pipe, batch_size):
    rows = [{"image": row["image"], "question": row["question"]} for row in make_rows(4)]
    results = pipe(rows, batch_size=batch_size)
    assert [one.asked for one in results] == [False, True, False, True]
    assert pipe([]) == []


def test_turns_are_streamed_as_they_end(pipe):
    turns = pipe(image=picture(0), question="Which number is 3?", stream=True)
    first = next(turns)
    assert (first.turn, first.text, first.result) == (0, CALLING, None)
    assert [one.size for one in first.pictures] == [(112, 112)]
    last = next(turns)
    assert (last.turn, last.answer, last.pictures) == (1, "seen", ())
    assert last.result.answer == "seen" and list(turns) == []
    rows = [{"image": row["image"], "question": row["question"]} for row in make_rows(2)]
    assert sorted((turn.index, turn.turn) for turn in pipe(rows, stream=True, batch_size=2)) == [
        (0, 0),
        (1, 0),
        (1, 1),
    ]


def test_an_episode_is_watched_from_its_opening_on(pipe):
    opening, middle, end = pipe.watch(image=picture(0), question="Which number is 3?")
    whole = pipe(image=picture(0), question="Which number is 3?").rollout
    assert (opening.status, middle.status, end.status) == (None, None, whole.status)
    assert [len(one.turns) for one in (opening, middle, end)] == [0, 1, 2]
    assert [[image.size for image in one.images] for one in (opening, middle)] == [[(56, 56)], [(56, 56), (112, 112)]]
    assert [one.visual_tokens for one in (opening, middle, end)] == [4, 20, 20]
    assert opening.completion_ids == [] and end.completion_ids[: len(middle.completion_ids)] == middle.completion_ids
    assert (end.prompt_ids, end.completion_ids) == (whole.prompt_ids, whole.completion_ids)
    shown = Transcript.of(middle)
    assert (shown.status, shown.finished, [one.status for one in shown.turns][-2:]) == (
        "under way",
        False,
        ["sampled", "told"],
    )
    assert Transcript.of(end).status == "answered" and Transcript.of(end).finished
    left = pipe.watch(image=picture(0), question="Which number is 3?")
    next(left), next(left)
    left.close()
    assert pipe(image=picture(0), question="Which number is 3?").answer == "seen"


@pytest.mark.parametrize("size", [(112, 112), (224, 112), (90, 70), (31, 300)])
def test_tokens_in_full_are_those_that_always_full_pays(checkpoint, pipe, size):
    full = VisionThinkPipeline(
        checkpoint, policy="always-full", **SETTINGS | {"environment_args": {"min_pixels": 3136}}
    )
    assert pipe.tokens_in_full(picture(0, size)) == full(image=picture(0, size), question="What?").visual_tokens


def test_pictures_come_as_files_bytes_and_objects(pipe, tmp_path):
    file, data = tmp_path / "a.png", io.BytesIO()
    picture(0).save(file)
    picture(0).save(data, "PNG")
    answers = pipe([{"image": one, "question": "What?"} for one in (file, str(file), data.getvalue(), picture(0))])
    assert len({tuple(one.rollout.prompt_ids) for one in answers}) == 1


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([{"image": picture(0), "question": "a"}, {"image": b"x", "question": "a"}], "row 1: cannot read the image"),
        ({"image": "https://x.y/z.png", "question": "a"}, "no local path; download it first"),
        ({"image": picture(0)}, "needs image and question"),
        ({"image": picture(0), "question": " "}, "question is empty"),
    ],
)
def test_inputs_that_cannot_be_used(pipe, inputs, words):
    with pytest.raises(DataError, match=words):
        pipe(inputs)


def test_settings_that_cannot_work(pipe, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="no_such.*does not load.*Give a folder"):
        VisionThinkPipeline(tmp_path / "no_such")
    with pytest.raises(ConfigError, match="use one of auto, vllm, transformers"):
        VisionThinkPipeline(checkpoint, backend="vlm")
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        VisionThinkPipeline(checkpoint, dtype="int4")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        pipe([], batch_size=0)
    with pytest.raises(ConfigError, match="give one of them"):
        pipe([], question="What?")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="an adapter without its base.*--merge"):
        VisionThinkPipeline(tmp_path)


def test_the_notes_of_a_run_lead_it(checkpoint, tmp_path):
    """Texts, resolution and limits as in training, without a word from the caller; a control keeps its own texts."""
    folder = shutil.copytree(checkpoint, tmp_path / "trained")
    environment = ResizeEnv(prompts=SHORT_PROMPTS, min_pixels=3136)
    facts = environment_facts(environment, SimpleNamespace(max_turn_tokens=5))
    RunNotes(environment=facts, recipe={"max_completion_length": 99}).write(folder)
    pipe = VisionThinkPipeline(folder, device="cpu")
    trained = pipe.runner.environment()
    assert (pipe.policy, trained.prompts, trained.rule) == ("two-turn", environment.prompts, environment.rule)
    assert pipe.runner.limits == Limits(turn=5, completion=99)
    control = VisionThinkPipeline(folder, device="cpu", policy="always-full").runner.environment()
    assert control.rule == environment.rule and "resize_image" not in control.prompts.system
    bare = VisionThinkPipeline(checkpoint, device="cpu").runner.environment()
    assert bare.prompts.system != "Tool" and bare.rule.min_pixels == 512 * 512


def test_a_banned_token_is_never_written(caller):
    """A checkpoint that would write image placeholders writes tool calls: the ban of training holds here, too."""
    pipe = VisionThinkPipeline(caller, **SETTINGS)
    ids = pipe(image=picture(0), question="What?").rollout.turns[0].token_ids
    image_id, call_id = pipe.model.parts.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<tool_call>"])
    assert ids[0] == call_id and image_id not in ids


def test_importing_the_package_stays_light():
    code = (
        "import sys, vt_trl; assert 'VisionThinkPipeline' in vt_trl.__all__; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
