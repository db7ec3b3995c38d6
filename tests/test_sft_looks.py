"""Fine-tuning on rationales with looks: their tokens are those of the rollout, in every frame and shape."""

from __future__ import annotations

import pytest
from conftest import FAMILY_NAMES, picture
from test_sft import SMALL, encoder_of, row

from vt_trl.dialogue import demonstrate, trl_example
from vt_trl.envs import make_environment
from vt_trl.errors import DataError
from vt_trl.generation.base import Sample, SamplingSettings, ScriptedBackend
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.sft import played

# A rationale with two looks, its boxes in pixels of an original of 224 x 112: 8 x 4 visual tokens of 28 px.
RATIONALE = {
    "segments": ["Where?", "Closer.", "It says 7."],
    "crops": [0.0, 0.0, 112.0, 112.0, 28.0, 28.0, 84.0, 84.0],
}
LOOKS = pytest.mark.parametrize(
    ("name", "shape", "boxes"),
    [
        ("zoom", "tool_call", None),
        ("zoom", "inline", None),
        ("zoom", "inline", "unit"),
        ("look", "tool_call", "per_mille"),
    ],
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@LOOKS
def test_a_rationale_with_looks_has_the_tokens_of_the_rollout(checkpoints, family, name, shape, boxes):
    """Written in the environment's frame and shape, played back through the rollout loop: equal to the last id."""
    encoder = encoder_of(checkpoints[family])
    tokenizer, sight = encoder.tokenizer, encoder.family.sight(encoder.features.image_processor)
    environment = make_environment(name, {"shape": shape, "boxes": boxes, "turns": 3}, sight)
    trace = played({**row(image=picture(1, (224, 112))), **RATIONALE}, environment)
    assert [region.box for region in trace.regions] == [(0, 0, 112, 112), (28, 28, 84, 84)]
    replies = [turn.text for turn in trace.turns]
    stop = tokenizer.convert_tokens_to_ids(encoder.family.turn_end)

    def script(request):
        turn = script.turn = script.turn + 1
        ids = encoder.text_ids(replies[turn]) + ([stop] if shape == "tool_call" or turn == 2 else [])
        return Sample(request.request_id, tuple(ids), (0.0,) * len(ids), True)

    script.turn = -1
    runner = RolloutRunner(environment, ScriptedBackend(script), encoder, [stop], Limits(500, 4000))
    (rollout,) = runner.run([row(image=picture(1, (224, 112)))], 1, SamplingSettings())
    assert rollout.well_formed and rollout.answer == "7" and len(rollout.images) == 3
    shown = demonstrate(trace, encoder)
    assert shown.token_ids == [*rollout.prompt_ids, *rollout.completion_ids]
    assert shown.loss_mask == [0] * len(rollout.prompt_ids) + rollout.loss_mask
    assert [image.tobytes() for image in shown.images] == [image.tobytes() for image in rollout.images]
    trained = tokenizer.decode([token for token in shown.labels if token != -100])
    between = "<|im_end|>" if shape == "tool_call" else ""
    assert trained == between.join(replies) + "<|im_end|>"  # no picture, no tool text, no closing that was put in


def test_pictures_inside_a_turn_are_parts_of_its_message_for_trl():
    trace = {**row(image=picture(1, (224, 112))), **RATIONALE}
    example = trl_example(played(trace, make_environment("zoom", {"shape": "inline"})))
    assert [one["role"] for one in example["messages"]] == ["system", "user", "assistant"]
    kinds = [part["type"] for part in example["messages"][-1]["content"]]
    assert kinds == ["text", "text", "image", "text", "text", "text", "image", "text", "text"]
    assert len(example["images"]) == 3


def test_a_rationale_is_written_in_the_frame_and_shape_of_the_environment():
    decoded = row(image=picture(1, (224, 112)))
    inline = make_environment("zoom", {"shape": "inline", "boxes": "per_mille"})()
    assert inline.trace(decoded, **RATIONALE) == [
        '<think>Where? {"bbox_2d": [0, 0, 500, 1000]}',
        'Closer. {"bbox_2d": [125, 250, 375, 750]}',
        "It says 7.</think><answer>7</answer>",
    ]
    call = make_environment("zoom", {"boxes": "shown_pixels"})().trace(decoded, **RATIONALE)[1]
    box = '{"name": "zoom_image", "arguments": {"bbox_2d": [28, 28, 84, 84]}}'
    assert call == f"<think>Closer.</think><tool_call>{box}</tool_call>"


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"crops": [1.0, 2.0]}, "zoom", "3 segments need 8 numbers in crops, not 2"),
        ({"crops": [0.0, 0.0, 3.0, 3.0, 28.0, 28.0, 84.0, 84.0]}, "zoom", "reply 1 is malformed .box_tiny"),
        ({"crops": [0.0, 0.0, 50.0, 50.0, 28.0, 28.0, 384.0, 84.0]}, "zoom", "reply 2 is malformed .box_outside"),
        ({}, "resize", "for the environments zoom and look"),
        ({"segments": ["a"] * 9, "crops": [0.0, 0.0, 50.0, 50.0] * 8}, "zoom", "the dialogue ends"),
    ],
)
def test_rationales_that_cannot_be_played_are_refused(changes, name, message):
    trace = {**row(image=picture(1, (224, 112))), **RATIONALE, **changes}
    with pytest.raises(DataError, match=f"(?s)id 'a'.*{message}|{message}"):
        played(trace, make_environment(name, None if name == "zoom" else SMALL))
