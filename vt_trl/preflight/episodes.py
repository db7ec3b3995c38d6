"""How long an episode can get: the environment is played on a blank picture, and its texts and pictures are counted.

Nothing here needs a tokenizer. A text is taken to have one token per ``CHARACTERS`` characters, which is on the safe
side for English; everything visual is counted with the image processor's own resizing rule.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vt_trl.config import VTGRPOConfig
from vt_trl.envs import Environment, make_environment
from vt_trl.preflight.counts import Widths
from vt_trl.types import Done, ImagePart, Message

logger = logging.getLogger(__name__)

CHARACTERS = 3.5  # per token; the prompts of this library have 4.3 with Qwen's tokenizer
FRAME = 5  # control tokens and role around a message
IMAGE_FRAME = 2  # vision start and end
LARGEST_SIDE = 4096  # of the blank picture, where neither environment nor processor bounds the area


@dataclass(frozen=True)
class PixelLimits:
    """Area bounds of the image processor, in pixels. The defaults are those of the published Qwen2.5-VL."""

    shortest: int = 3136
    longest: int = 12_845_056


@dataclass(frozen=True)
class Episode:
    """Tokens, pictures and patches of one rollout. ``limit``: what cuts a completion short, in tokens."""

    prompt_text: int
    prompt_visual: int
    reply_text: int  # tool text between turns
    reply_visual: int
    sampled: int
    patches: int  # of all pictures
    images: int
    prompt_patches: int
    prompt_images: int
    turns: int = 0
    limit: int | None = None

    @property
    def prompt(self) -> int:
        return self.prompt_text + self.prompt_visual

    @property
    def completion(self) -> int:
        whole = self.reply_text + self.reply_visual + self.sampled
        return whole if self.limit is None else min(whole, self.limit)

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion

    @property
    def loss_tokens(self) -> int:
        """Sampled tokens of the completion, as far as ``limit`` leaves them in it."""
        return self.completion - self.reply_text - self.reply_visual

    @property
    def reply_patches(self) -> int:
        return self.patches - self.prompt_patches

    @property
    def reply_images(self) -> int:
        return self.images - self.prompt_images

    @property
    def visual(self) -> int:
        return self.prompt_visual + self.reply_visual


@dataclass(frozen=True)
class Workload:
    """What an average rollout is assumed to look like. These are assumptions, never measurements.

    The defaults are the setting this library's speed figures are made for: a picture of 1.1 million pixels (about 350
    visual tokens at low and 1400 at full resolution), 150 sampled tokens per turn, 40% of the rollouts ask. ``tail``:
    the longest rollout of a generation samples this many times the average, and all others are padded to it.
    """

    picture: tuple[int, int] = (1048, 1048)
    turn_tokens: int = 150
    asks: float = 0.4
    question_tokens: int = 64
    tail: float = 4.0


QUESTION_LIMIT = 512  # tokens of the longest question, for the limits


def longest_episode(args: VTGRPOConfig, widths: Widths, limits: PixelLimits) -> Episode:
    """The longest episode that settings allow: largest picture, every turn at its limit."""
    environment = make_environment(args.environment, args.environment_args)()
    area = min(environment.max_image_pixels or limits.longest, limits.longest)
    side = min(math.isqrt(area), LARGEST_SIDE)

    def whole(route: Episode) -> Episode:
        limit = args.max_completion_length
        if args.use_vllm and args.vllm_max_model_length:
            limit = min(limit, max(1, args.vllm_max_model_length - route.prompt))
        return _cut(route, environment.max_turns * args.max_turn_tokens, limit)

    routes = _routes(args, (side, side), QUESTION_LIMIT, widths, limits)
    return max(map(whole, routes), key=lambda episode: (episode.tokens, episode.patches))


def typical_episodes(
    args: VTGRPOConfig, widths: Widths, limits: PixelLimits, workload: Workload
) -> list[tuple[float, Episode]]:
    """The routes of an average picture with their shares: answered at once, or asked and then answered."""
    routes = _routes(args, workload.picture, workload.question_tokens, widths, limits)
    turn = min(workload.turn_tokens, args.max_turn_tokens)
    routes = [_cut(route, route.turns * turn, args.max_completion_length) for route in routes]
    short, long = min(routes, key=lambda one: one.tokens), max(routes, key=lambda one: one.tokens)
    return [(1.0, short)] if short == long else [(1 - workload.asks, short), (workload.asks, long)]


def _cut(route: Episode, sampled: int, limit: int) -> Episode:
    """A route with its sampled tokens. Tool replies that do not fit into a completion end the episode instead."""
    if route.reply_text + route.reply_visual <= limit:
        return replace(route, sampled=sampled, limit=limit)
    prompt = replace(route, reply_text=0, reply_visual=0, patches=route.prompt_patches, images=route.prompt_images)
    return replace(prompt, sampled=sampled, limit=limit)


def visual_patches(size: tuple[int, int], widths: Widths, limits: PixelLimits) -> int:
    """Patches of a picture of (width, height) pixels; ``merge ** 2`` of them become one visual token."""
    height, width = smart_resize(size[1], size[0], widths.factor, limits.shortest, limits.longest)
    return (height // widths.side) * (width // widths.side)


def text_tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS)


def _routes(
    args: VTGRPOConfig, size: tuple[int, int], question: int, widths: Widths, limits: PixelLimits
) -> tuple[Episode, ...]:
    settings = json.dumps(args.environment_args, sort_keys=True, default=str)
    return _played(args.environment, settings, size, question, widths, limits)


@lru_cache(maxsize=64)  # advice asks again and again, and a large picture takes a moment to resize
def _played(
    name: str, settings: str, size: tuple[int, int], question: int, widths: Widths, limits: PixelLimits
) -> tuple[Episode, ...]:
    """One episode per gold route, without sampled tokens. An environment that cannot be played on a blank picture is
    taken to show its largest picture in every turn."""
    environment = make_environment(name, json.loads(settings))()
    row = {
        "id": "preflight",
        "image": Image.new("RGB", size),
        "question": "x" * math.floor(question * CHARACTERS),
        "answer": ["1"],
        "data_source": "preflight",
    }
    try:
        start = _tally(environment.reset(row).messages, widths, limits)
        routes = tuple(_play(environment, row, replies, widths, limits) for replies in environment.gold_replies(row))
    except Exception as error:  # a third party's class may want columns that nobody here knows
        logger.info("The environment cannot be played on a blank picture: %s", error)
        patches = visual_patches(size, widths, limits)
        start, routes = Episode(question + 256, patches // widths.merge**2, 0, 0, 0, patches, 1, patches, 1), ()
    if routes:
        return routes
    patches, replies = visual_patches(size, widths, limits), environment.max_turns - 1
    most = replace(
        start,
        reply_text=replies * 64,
        reply_visual=replies * patches // widths.merge**2,
        patches=start.patches + replies * patches,
        images=start.images + replies,
        turns=environment.max_turns,
    )
    return (replace(start, turns=1), most) if replies else (most,)


def _play(
    environment: Environment, row: dict[str, Any], replies: Iterable[str], widths: Widths, limits: PixelLimits
) -> Episode:
    episode = environment.fork()
    whole = _tally(episode.reset(row).messages, widths, limits)
    for reply in replies:
        whole = replace(whole, turns=whole.turns + 1)
        outcome = episode.step(reply)
        if isinstance(outcome, Done):
            break
        shown = _tally(outcome.messages, widths, limits)
        whole = replace(
            whole,
            reply_text=whole.reply_text + shown.prompt_text,
            reply_visual=whole.reply_visual + shown.prompt_visual,
            patches=whole.patches + shown.patches,
            images=whole.images + shown.images,
        )
    return whole


def _tally(messages: Iterable[Message], widths: Widths, limits: PixelLimits) -> Episode:
    """Messages counted as if they were a prompt, with the opening of the next turn."""
    text, visual, patches, images = FRAME, 0, 0, 0
    for message in messages:
        text += FRAME
        for part in message.parts:
            if isinstance(part, ImagePart):
                count = visual_patches(part.image.size, widths, limits)
                patches, images, text = patches + count, images + 1, text + IMAGE_FRAME
                visual += count // widths.merge**2
            else:
                text += text_tokens(part.text)
    return Episode(text, visual, 0, 0, 0, patches, images, patches, images)
