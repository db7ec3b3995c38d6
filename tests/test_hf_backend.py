"""Generation with transformers: what is recorded is what the trainer's forward says, and nobody else's settings count.

Worst difference of a log-probability seen: 9.5e-07 in both families, in fp32 on a CPU; a wrong temperature makes 0.1.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import FAMILY_NAMES, make_rows, picture
from helpers import Boxes
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vt_trl.chat import ChatEncoder
from vt_trl.envs.base import Environment, system, user
from vt_trl.families import family_of
from vt_trl.features import ImageFeatures
from vt_trl.generation import hf
from vt_trl.generation.base import Request, SamplingSettings
from vt_trl.generation.hf import HFBackend
from vt_trl.packing import pack
from vt_trl.rollout import Limits, RolloutRunner
from vt_trl.token_ban import ban_tokens
from vt_trl.types import Done, Observation, RolloutStatus

TOLERANCE = 1e-5
LARGE = picture(9, (224, 112))
PER_FAMILY = pytest.mark.parametrize("world", FAMILY_NAMES, indirect=True)


class AlwaysLooks(Environment):
    """Whatever the first reply is, it is shown a second picture; the second reply is the answer."""

    max_turns = 2

    def reset(self, row):
        self.turn = 0
        return self.show(system("S"), user(row["image"], row["question"]))

    def step(self, reply, truncated=False):
        self.turn += 1
        if self.turn == 1:
            return Observation((user("see ", LARGE, " now"),), called=True, granted=True)
        return Done(RolloutStatus.ANSWERED, answer=reply)


class World:
    def __init__(self, folder):
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.saved = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.settings = self.model.generation_config
        processor = AutoProcessor.from_pretrained(folder)
        tokenizer, family = processor.tokenizer, family_of(self.model.config)
        self.family = family
        self.features = ImageFeatures(processor.image_processor)
        self.encoder = ChatEncoder(tokenizer, family, self.features)
        self.pad, self.stops = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.image_id = tokenizer.convert_tokens_to_ids(family.image_token)
        rows = self.model.get_output_embeddings().weight.shape[0]
        self.banned = family.banned_ids(tokenizer, rows, set(self.stops))
        ban_tokens(self.model, self.banned)

    def backend(self, **changes) -> HFBackend:
        ids = {"pad_id": self.pad, "stop_ids": self.stops, "banned_ids": self.banned, "image_token_id": self.image_id}
        return HFBackend.for_model(self.model, self.features, **{**ids, **changes})

    def rollouts(self, settings: SamplingSettings, turn: int = 12, group: int = 3, **changes):
        """Two turns each, of prompts of different lengths, so that batches are padded."""
        rows = make_rows(2, (84, 56))
        rows[1] |= {"question": "Which number of all these numbers is it?", "image": picture(5, (56, 140))}
        backend = self.backend(max_batch=4, **changes)
        runner = RolloutRunner(AlwaysLooks, backend, self.encoder, self.stops, Limits(turn, 2000))
        found = runner.run(rows, group, settings)
        assert [len(rollout.turns) for rollout in found] == [2] * 2 * group
        assert [len(rollout.images) for rollout in found] == [2] * 2 * group
        return found

    @torch.no_grad()
    def logits(self, rollouts) -> torch.Tensor:
        """(B, C, V) logits of the completion tokens by one padded forward, every picture as often as it is shown."""
        batch = pack(
            rollouts, self.features, pad_id=self.pad, image_token_id=self.image_id, device=torch.device("cpu")
        )
        length = batch["completion_ids"].shape[1]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            mm_token_type_ids=(ids == self.image_id).int(),
            **self.features.batch([image for rollout in rollouts for image in rollout.images]),
        ).logits
        return logits[:, -length - 1 : -1]

    def worst(self, rollouts, temperature: float = 1.0) -> float:
        logps = torch.log_softmax(self.logits(rollouts) / temperature, -1)
        gaps = []
        for row, rollout in enumerate(rollouts):
            for place, (token, logp) in enumerate(zip(rollout.completion_ids, rollout.logprobs, strict=True)):
                if rollout.loss_mask[place]:
                    gaps.append(abs(logps[row, place, token].item() - logp))
        print(f"worst difference {max(gaps):.1e} over {len(gaps)} tokens")
        assert len(gaps) > 2 * len(rollouts)
        return max(gaps)

    def request(self, index: int = 0, limit: int = 8, text: str = "What?") -> Request:
        prompt = self.encoder.prompt([user(LARGE, text)])
        return Request(index, tuple(prompt.token_ids), tuple(prompt.images), limit)

    def sample(self, requests, settings: SamplingSettings | None = None, **changes) -> dict[int, object]:
        backend = self.backend(**changes)
        backend.begin(settings or SamplingSettings())
        for request in requests:
            backend.submit(request)
        samples = list(backend.completed())
        assert len(samples) == len(requests)
        return {sample.request_id: sample for sample in samples}


@pytest.fixture(scope="module")
def worlds(checkpoints):
    return cache(lambda family: World(checkpoints[family]))


@pytest.fixture
def world(request, worlds):
    """A world with the weights and generation settings it was built with."""
    world = worlds(getattr(request, "param", "qwen2_5_vl"))
    yield world
    world.model.load_state_dict(world.saved)
    world.model.generation_config = world.settings


@PER_FAMILY
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_recorded_log_probabilities_are_those_of_the_forward(world, temperature):
    rollouts = world.rollouts(SamplingSettings(temperature=temperature))
    assert world.worst(rollouts, temperature) < TOLERANCE
    # The test can tell temperatures apart: recorded at one, they do not fit another.
    assert world.worst(rollouts, temperature + 0.3) > 100 * TOLERANCE


@PER_FAMILY
def test_nucleus_and_top_k_leave_the_recorded_distribution_whole(world):
    rollouts = world.rollouts(SamplingSettings(top_p=0.9, top_k=20, min_p=0.01))
    assert world.worst(rollouts) < TOLERANCE


@PER_FAMILY
def test_greedy_is_the_argmax_of_the_forward_in_every_turn(world):
    rollouts = world.rollouts(SamplingSettings(temperature=0.0))
    best = world.logits(rollouts).argmax(-1)
    for row, rollout in enumerate(rollouts):
        sampled = [place for place, keep in enumerate(rollout.loss_mask) if keep]
        assert [best[row, place].item() for place in sampled] == [rollout.completion_ids[place] for place in sampled]
        assert rollout.completion_ids == rollouts[row // 3 * 3].completion_ids  # a group is of one mind
    assert world.worst(rollouts) < TOLERANCE


@PER_FAMILY
def test_banned_ids_are_never_sampled_even_if_the_head_prefers_them(world):
    head = world.model.get_output_embeddings()
    bias = head.bias.clone()
    try:
        head.bias[world.banned] = 50.0  # without a ban of its own the backend would draw nothing else
        requests = [world.request(index) for index in range(4)]
        free = world.sample(requests, banned_ids=[])
        assert all(set(sample.token_ids) <= set(world.banned) for sample in free.values())
        for settings in (SamplingSettings(), SamplingSettings(temperature=0.0), SamplingSettings(temperature=2.0)):
            drawn = world.sample(requests, settings)
            assert not any(set(sample.token_ids) & set(world.banned) for sample in drawn.values())
    finally:
        head.bias.copy_(bias)


# The first is what Qwen2.5-VL ships. Which fields leak depends on the version of transformers: some replaced every
# value that equals a default, 5.23 fills those left at None, such as min_p, of which 1.0 means greedy.
PUBLISHED = {"do_sample": True, "temperature": 1e-6, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.05}


@pytest.mark.parametrize("foreign", [PUBLISHED, {"min_p": 1.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8}])
def test_the_checkpoints_own_generation_settings_have_no_influence(world, foreign):
    def drawn():
        torch.manual_seed(0)
        return world.sample([world.request(index) for index in range(4)])

    plain = drawn()
    world.model.generation_config = own = GenerationConfig(**foreign)
    assert drawn() == plain and len({sample.token_ids for sample in plain.values()}) == 4
    assert world.model.generation_config is own  # and they are given back


def test_without_the_guard_they_would_have(world, monkeypatch):
    monkeypatch.setattr(hf, "_own_generation_config", lambda model, config: nullcontext())
    world.model.generation_config = GenerationConfig(min_p=1.0)
    drawn = world.sample([world.request(index) for index in range(4)])
    assert len({sample.token_ids for sample in drawn.values()}) == 1  # greedy, though sampling was asked for


def test_each_request_is_cut_at_its_own_limit(world):
    requests = [world.request(index, limit=limit) for index, limit in enumerate((3, 1, 7))]
    samples = world.sample(requests, stop_ids=[world.pad], banned_ids=[*world.banned, world.pad])
    assert [len(samples[index].token_ids) for index in range(3)] == [3, 1, 7]
    assert not any(sample.finished for sample in samples.values())
    assert all(len(sample.logprobs) == len(sample.token_ids) for sample in samples.values())


def test_a_stop_token_ends_a_sample_and_belongs_to_it(world):
    (greedy,) = world.sample([world.request()], SamplingSettings(temperature=0.0), stop_ids=[world.pad]).values()
    ids = greedy.token_ids
    stop = ids[2]
    end = ids.index(stop) + 1
    for limit, finished in ((8, True), (end, True), (end - 1, False)):
        if limit:
            request = world.request(limit=limit)
            (sample,) = world.sample([request], SamplingSettings(temperature=0.0), stop_ids=[stop]).values()
            assert (sample.token_ids, sample.finished) == (ids[: min(end, limit)], finished)
            assert sample.logprobs == pytest.approx(greedy.logprobs[: min(end, limit)], abs=1e-5)


@PER_FAMILY
def test_a_batch_samples_what_each_request_would_alone(world):
    greedy = SamplingSettings(temperature=0.0)
    requests = [
        world.request(0, text="?"),
        world.request(1, text="Which of them, and why?"),
        world.request(2, limit=4),
    ]
    without = world.encoder.prompt([user("no picture at all")])
    requests.append(Request(3, tuple(without.token_ids), (), 8))
    together = world.sample(requests, greedy)
    for request in requests:
        alone = world.sample([request], greedy)[request.request_id]
        assert alone.token_ids == together[request.request_id].token_ids
        assert alone.logprobs == pytest.approx(together[request.request_id].logprobs, abs=1e-5)


def test_turns_submitted_while_samples_arrive_are_sampled_too(world):
    backend, ended = world.backend(), []
    backend.begin(SamplingSettings())
    backend.submit(world.request(0))
    for sample in backend.completed():
        ended.append(sample.request_id)
        if len(ended) < 3:
            backend.submit(world.request(len(ended)))
    assert ended == [0, 1, 2]


def test_nothing_of_an_interrupted_phase_is_left(world):
    backend = world.backend()
    backend.begin(SamplingSettings())
    backend.submit(world.request())
    backend.end()
    assert list(backend.completed()) == []


def test_a_stop_text_ends_a_sample_at_the_token_that_completes_it(world):
    greedy, decode = SamplingSettings(temperature=0.0), world.encoder.tokenizer.decode
    requests = [world.request(index, text=text) for index, text in enumerate(("?", "Which of them, and why?"))]
    whole = world.sample(requests, greedy, stop_ids=[world.pad])
    for number, letters in ((0, 2), (1, 1)):
        ids = whole[number].token_ids
        stop = decode(ids[1 : 1 + letters])  # a text of one or two tokens, where it first occurs
        end = next(end for end in range(1, len(ids) + 1) if stop in decode(ids[:end]))
        stopped = [replace(request, stop=(stop, "no such text")) for request in requests[number : number + 1]]
        others = [request for request in requests if request is not requests[number]]
        samples = world.sample([*stopped, *others], greedy, stop_ids=[world.pad], tokenizer=world.encoder.tokenizer)
        assert samples[number].token_ids == ids[:end] and samples[number].finished and end < len(ids)
        assert samples[1 - number] == whole[1 - number]  # a neighbour without it goes on
        assert samples[number].logprobs == pytest.approx(whole[number].logprobs[:end], abs=1e-5)


def test_stop_texts_need_a_tokenizer(world):
    with pytest.raises(ValueError, match="no tokenizer"):
        world.sample([replace(world.request(), stop=("}",))])


@PER_FAMILY
def test_an_episode_with_pictures_inside_its_turn_is_trained_on_as_it_was_sampled(world):
    sight = world.family.sight(world.features.image_processor)
    row = {**make_rows(1, (112, 112))[0]}
    backend = world.backend(tokenizer=world.encoder.tokenizer, stop_ids=[world.pad])
    runner = RolloutRunner(lambda: Boxes(sight, 4, 3), backend, world.encoder, [world.pad], Limits(200, 3000))
    rollouts = runner.run([row], 3, SamplingSettings())
    assert all(len(rollout.turns) == 4 and len(rollout.images) == 4 for rollout in rollouts)
    assert world.worst(rollouts) < TOLERANCE
    start = world.encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert not any(start in rollout.completion_ids for rollout in rollouts)  # it is one assistant turn
