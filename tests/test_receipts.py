"""Real receipts at full size through `zoom` and `look`: the recipes' limits, real tokenizers, templates, processors.

No model: what is said is scripted. What is shown, where it came from, what it costs and how it lies in the batch is
worked out here from the picture's size and the numbers that were written.
"""

from __future__ import annotations

import json
from math import ceil, floor, sqrt
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILY_NAMES
from PIL import Image
from shipped import ROOT
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from vt_trl.data import episode_row, load_rows
from vt_trl.envs import make_environment
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures, ImageSizes
from vt_trl.generation.base import Sample, SamplingSettings, ScriptedBackend
from vt_trl.generation.standalone import Parts, make_parts
from vt_trl.packing import check_alignment, pack, placeholder_runs
from vt_trl.rollout import Limits
from vt_trl.types import Fault, Rollout, RolloutStatus

S, F = RolloutStatus, Fault
FACTOR = {"qwen2_5_vl": 28, "qwen3_vl": 32}
MOST_TOKENS = {"qwen2_5_vl": 12_845_056 // 28**2, "qwen3_vl": 1_310_720 // 32**2}  # by preprocessor_config.json
FRAME = {"qwen2_5_vl": "in pixels of the image as it was shown", "qwen3_vl": "in thousandths of the image's width"}
# Shares of a receipt: the total at the bottom right, the head, one line, most of it.
TOTAL, HEAD, LINE, MOST = (0.5, 0.6, 1.0, 0.75), (0.0, 0.0, 1.0, 0.2), (0.1, 0.4, 0.6, 0.42), (0.02, 0.02, 0.98, 0.98)
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def parts_of(real_checkpoints):
    """Family -> everything but the weights."""
    found: dict[str, Parts] = {}
    for name in FAMILY_NAMES:
        config, processor = (kind.from_pretrained(real_checkpoints[name]) for kind in (AutoConfig, AutoProcessor))
        found[name] = make_parts(config, processor, family_of(config), GenerationConfig())
    return found


@pytest.fixture(scope="module")
def rows(receipts) -> list[dict[str, Any]]:
    """One question about each of the 24 receipts."""
    return [episode_row(row) for row in list(load_rows(receipts))[::3]]


def recipe(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def written(family: str, share: Box, shown: tuple[int, int]) -> list[int]:
    """A box in the family's frame, in whole numbers as models write them."""
    sides = shown if family == "qwen2_5_vl" else (1000, 1000)
    return [round(value * sides[edge % 2]) for edge, value in enumerate(share)]


def region_of(family: str, box: list[int], shown: tuple[int, int], original: tuple[int, int]) -> tuple[int, ...]:
    """The whole pixels of the original around a box that was written."""
    sides = shown if family == "qwen2_5_vl" else (1000, 1000)
    exact = [round(value * original[edge % 2] / sides[edge % 2], 6) for edge, value in enumerate(box)]
    return (*map(floor, exact[:2]), *map(ceil, exact[2:]))


class Script:
    """Plays ``plans[member](row's pictures as shown) -> replies``; a reply that goes on after a picture has no end."""

    def __init__(self, parts: Parts, plans: list, inline: bool):
        self.tokenizer, self.plans, self.inline = parts.tokenizer, plans, inline
        self.turns: dict[int, int] = {}

    def __call__(self, request) -> Sample:
        turn = self.turns.get(request.request_id, 0)
        self.turns[request.request_id] = turn + 1
        replies = self.plans[request.request_id % len(self.plans)]([one.size for one in request.images])
        ids = self.tokenizer(replies[turn], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        goes_on = self.inline and turn < len(replies) - 1
        ids = tuple(ids) if goes_on else (*ids, self.tokenizer.eos_token_id)
        assert request.stop == (("}",) if self.inline else ()) and len(ids) <= request.max_new_tokens
        return Sample(request.request_id, ids, (-0.5,) * len(ids), finished=True)


def play(parts: Parts, name: str, rows: list, plans: list) -> list[list[Rollout]]:
    """Rollouts by row and plan, under the limits of a recipe."""
    given = recipe(name)
    parts.features.clear()
    environment = make_environment(given["environment"], given["environment_args"], parts.sight)
    limits = Limits(given["max_turn_tokens"], given["max_completion_length"], given["vllm_max_model_length"])
    backend = ScriptedBackend(Script(parts, plans, given["environment_args"].get("shape") == "inline"))
    runner = parts.runner(backend, environment, limits)
    runner.encoder.features = ImageSizes(parts.processor.image_processor)  # patches of 24 receipts are 3 GB
    found = runner.run(rows, len(plans), SamplingSettings(temperature=1.0))
    for one in found:
        assert len(one.completion_ids) <= limits.completion
        assert len(one.prompt_ids) + len(one.completion_ids) <= limits.context
    return [found[at : at + len(plans)] for at in range(0, len(found), len(plans))]


def check(rollout: Rollout, family: str, parts: Parts, most_opening: int, originals: list[Image.Image]) -> list[int]:
    """What holds of every rollout; its visual tokens by picture."""
    sizes = ImageSizes(parts.processor.image_processor)
    check_alignment(rollout, sizes, parts.image_token_id)
    factor, tokens = FACTOR[family], []
    for number, image in enumerate(rollout.images):
        assert image.width % factor == image.height % factor == 0
        tokens.append(image.width * image.height // factor**2)
        assert sizes.visual_tokens(image) == tokens[-1]  # the processor shows it as it is
        region = rollout.parts.get(number)
        if region is None:
            assert tokens[-1] <= most_opening
            continue
        assert 4 <= tokens[-1] <= 1024
        left, top, right, bottom = map(int, region.box)
        original = originals[region.picture]
        assert 0 <= left < right <= original.width and 0 <= top < bottom <= original.height
        expected = original.resize(image.size, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
        assert image.tobytes() == expected.tobytes()
    assert rollout.visual_tokens == sum(tokens)
    assert placeholder_runs([*rollout.prompt_ids, *rollout.completion_ids], parts.image_token_id) == tokens
    return tokens


def packed(rollouts: list[Rollout], parts: Parts) -> dict[str, Any]:
    """The batch with real patches, checked: as many features as image tokens, none of them trained."""
    features = ImageFeatures(parts.processor.image_processor)
    batch = pack(rollouts, features, pad_id=0, image_token_id=parts.image_token_id, device=torch.device("cpu"))
    merge = parts.processor.image_processor.merge_size**2
    for row, rollout in enumerate(rollouts):
        ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]])
        patches = sum(len(batch["pixel_values"][index]) for index in batch["image_index"][row])
        assert (ids == parts.image_token_id).sum() == patches // merge == rollout.visual_tokens
        trained = batch["completion_ids"][row][batch["tool_mask"][row].bool()]
        assert not (trained == parts.image_token_id).any()
        spoken = "".join(turn.text for turn in rollout.turns)
        assert parts.tokenizer.decode(trained[trained != parts.tokenizer.eos_token_id]) == spoken
    return batch


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_receipt_is_zoomed_into(parts_of, rows, family):
    """Recipe vlm_r3_lora: boxes in the reasoning. Two looks; a box outside; an answer at once; looks without end."""
    parts = parts_of[family]

    def look(share: Box, shown, before: str = "") -> str:
        return before + json.dumps({"bbox_2d": written(family, share, shown[0])})

    end = " 47.70.</think><answer>47.70</answer>"
    plans = [
        lambda shown: [look(TOTAL, shown, "<think>Below: "), look(HEAD, shown, " Above: "), end],
        lambda shown: [look((0, 0, 3, 0.5), shown, "<think>There: "), end],
        lambda shown: [f"<think>It says{end}"],
        lambda shown: [look(MOST, shown, "<think>All: "), *[look(MOST, shown, " Again: ")] * 7],
    ]
    groups = play(parts, "vlm_r3_lora", rows, plans)
    for row, (looked, outside, direct, endless) in zip(rows, groups, strict=True):
        original, shown = row["image"], looked.images[0].size
        budget = min(3_211_264 // FACTOR[family] ** 2, MOST_TOKENS[family])
        tokens = [check(one, family, parts, budget, [original]) for one in (looked, outside, direct, endless)]
        assert FRAME[family] in looked.messages[1].text and [len(one) for one in tokens] == [3, 1, 1, 8]
        boxes = [written(family, share, shown) for share in (TOTAL, HEAD)]
        expected = [region_of(family, box, shown, original.size) for box in boxes]
        assert [region.box for region in looked.regions] == expected
        assert [one.status for one in (looked, outside, direct)] == [S.ANSWERED] * 3 and looked.well_formed
        assert (endless.status, endless.answer) == (S.TURN_LIMIT, None)
        assert outside.faults == [F.BOX_OUTSIDE] and not outside.asked
        whole = original.width * original.height / FACTOR[family] ** 2
        assert min(tokens[3][1:]) >= 0.85 * min(1024, whole)  # most of a receipt: as it is, up to what a crop may take
        # The total is an eighth of a receipt and less than that in area: enlarged, up to twice.
        left, top, right, bottom = expected[0]
        assert tokens[0][1] <= max(4, 1.2 * 4 * (right - left) * (bottom - top) / FACTOR[family] ** 2)
    by_area = sorted(range(len(rows)), key=lambda number: rows[number]["image"].width * rows[number]["image"].height)
    for number in (by_area[0], by_area[-1]):
        batch = packed(groups[number], parts)
        assert len(set(batch["prompt_index"])) == 1 and len(batch["pixel_values"]) == 1 + 2 + 1  # each picture once


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_receipt_is_looked_at(parts_of, rows, family):
    """Recipe look_lora, three receipts to a question: a part of a part, larger scales, and what the budget refuses."""
    parts, close = parts_of[family], "<think>So.</think><answer>47.70</answer>"

    def call(tool: str, **arguments) -> str:
        said = json.dumps({"name": tool, "arguments": arguments})
        return f"<think>Too small.</think><tool_call>{said}</tool_call>"

    def box(share: Box, shown, image: int) -> str:
        return call("zoom_image", bbox_2d=written(family, share, shown[image - 1]), image=image)

    plans = [
        lambda shown: [box(MOST, shown, 2), *([box(LINE, shown, 4), close] if len(shown) > 3 else [close, close])],
        lambda shown: [*(call("resize_image", scale="full", image=number) for number in (1, 2, 3)), close],
        lambda shown: [call("resize_image", scale=1.5, image=3), close],
        lambda shown: [close],
    ]
    triples = [rows[at : at + 3] for at in range(0, len(rows), 3)]
    asked = [{**one[0], "images": [row["image"] for row in one]} for one in triples]
    groups = play(parts, "look_lora", asked, plans)
    refused = 0
    for row, (nested, full, larger, direct) in zip(asked, groups, strict=True):
        opening = [image.size for image in nested.images[:3]]
        most = min(4_194_304 // FACTOR[family] ** 2, MOST_TOKENS[family])
        tokens = [check(one, family, parts, most, row["images"]) for one in (nested, full, larger, direct)]
        assert max(map(sum, tokens)) <= 8192
        for original, shown in zip(row["images"], opening, strict=True):  # half of each side in full, on the grid
            full_tokens = original.width * original.height / FACTOR[family] ** 2
            scale = 2 * max(1, sqrt(full_tokens / most))
            for side, whole in zip(shown, original.size, strict=True):
                assert abs(side - whole / scale) <= FACTOR[family] * 1.5
        outer = region_of(family, written(family, MOST, opening[1]), opening[1], row["images"][1].size)
        width, height = outer[2] - outer[0], outer[3] - outer[1]
        inner = region_of(family, written(family, LINE, nested.images[3].size), nested.images[3].size, (width, height))
        left, top, *_ = outer
        assert [region.box for region in nested.regions] == [
            outer,
            (left + inner[0], top + inner[1], left + inner[2], top + inner[3]),
        ]
        assert {region.picture for region in nested.regions} == {1} and nested.well_formed
        assert [one.status for one in (nested, full, larger, direct)] == [S.ANSWERED] * 4
        over = [fault for fault in full.faults if fault is F.OVER_BUDGET]
        refused += len(over)
        assert len(full.images) == 6 - len(over) and full.faults == over
        factor = larger.images[3].width / opening[2][0]
        assert 1.3 < factor < 1.7 and not larger.regions
    # Three in full, with three halves before them, are up to 9,400 tokens; those of Qwen3-VL at most 4,800.
    assert refused < 3 * len(asked) and (refused > 0) == (family == "qwen2_5_vl")
    batch = packed(groups[0], parts)
    assert batch["prompt_images"] == [3] * 4 and len(set(batch["prompt_index"])) == 1
