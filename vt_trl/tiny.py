"""Tiny offline checkpoints: the real model and processor classes, a few million random weights, nothing downloaded.

Tests, demos and training on a laptop need a checkpoint that loads like the big ones and answers in milliseconds.
``build_tiny`` writes one from code alone. By default it trains its own byte-level BPE on the fixed phrases of a task,
so that a tool call is three tokens and a whole episode a few dozen; with ``tokenizer_dir`` it takes a real Qwen
tokenizer and the real processor limits instead. Attention heads are always 64 wide, which every backend accepts.

    python -m vt_trl.tiny DIR [--family qwen3_vl] [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

HEAD = 64  # attention head width of both towers; vLLM's CPU kernels want 32 or more
MERGE = 2  # patches per side that become one visual token

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN_TOKENS = ("<tool_call>", "</tool_call>")  # one token each, yet visible text: not special, as in Qwen

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class _Family:
    """What differs between the families: classes, patch side in pixels, and the parts of the configuration."""

    config: type
    model: type
    processor: type
    video_processor: type
    patch: int
    image_stats: dict[str, list[float]]  # mean and std per channel, when they are not the image processor's own
    rope: dict[str, Any]  # mrope sections sum to HEAD / 2
    text: dict[str, Any]
    vision: dict[str, Any]


FAMILIES = {
    "qwen2_5_vl": _Family(
        config=Qwen2_5_VLConfig,
        model=Qwen2_5_VLForConditionalGeneration,
        processor=Qwen2_5_VLProcessor,
        video_processor=Qwen2VLVideoProcessor,
        patch=14,
        image_stats={},
        rope={"mrope_section": [8, 12, 12]},
        text={},
        vision={"window_size": 112, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _Family(
        config=Qwen3VLConfig,
        model=Qwen3VLForConditionalGeneration,
        processor=Qwen3VLProcessor,
        video_processor=Qwen3VLVideoProcessor,
        patch=16,
        image_stats={"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        rope={"mrope_section": [12, 10, 10], "mrope_interleaved": True},
        text={"head_dim": HEAD},
        # One layer feeds its features into the first text layer, so deepstack is exercised; 16 x 16 learned positions.
        vision={"deepstack_visual_indexes": [0], "num_position_embeddings": 256},
    ),
}


def build_tiny(
    path: str | Path,
    family: str = "qwen2_5_vl",
    seed: int = 0,
    corpus: Iterable[str] = (),
    hidden_size: int = 128,
    layers: int = 2,
    vision_layers: int = 2,
    tokenizer_dir: str | Path | None = None,
    max_pixels: int | None = None,
    min_pixels: int | None = None,
) -> Path:
    """Write a tiny float32 checkpoint with its processor to ``path`` and return the path.

    Args:
        family: ``qwen2_5_vl`` (28 px per visual token and side) or ``qwen3_vl`` (32 px).
        seed: of the random weights; the caller's torch random state is left as it was.
        corpus: fixed phrases that become single tokens. Leave out whatever must stay in letters, such as answers.
        hidden_size: width of both towers, a multiple of 64.
        layers: layers of the language model; ``vision_layers`` those of the vision tower (2 or more).
        tokenizer_dir: a folder with a real tokenizer; its ``preprocessor_config.json``, ``config.json`` (vocabulary
            rows) and chat template are taken too, if there. ``corpus`` must then be empty: nothing is trained.
        max_pixels, min_pixels: size limits of an image; by default 1 to 256 visual tokens, or ``tokenizer_dir``'s.

    Raises:
        ValueError: for a family, width or depth that cannot work.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not known; choose one of {sorted(FAMILIES)}")
    if hidden_size % HEAD or hidden_size < HEAD:
        raise ValueError(f"hidden_size={hidden_size} does not split into heads of {HEAD}; use a multiple of {HEAD}")
    if layers < 1 or vision_layers < 2:
        raise ValueError(f"{layers=} and {vision_layers=}: at least 1 and 2 are needed")
    phrases = tuple(corpus)
    if tokenizer_dir is not None and phrases:
        raise ValueError("corpus was given together with tokenizer_dir: a ready tokenizer learns no phrases; drop one")

    path, kind = Path(path), FAMILIES[family]
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = phrase_tokenizer(phrases) if tokenizer_dir is None else AutoTokenizer.from_pretrained(tokenizer_dir)
    _processor(kind, tokenizer, tokenizer_dir, min_pixels, max_pixels).save_pretrained(path)

    config = _config(kind, tokenizer, _vocab_rows(tokenizer, tokenizer_dir), hidden_size, layers, vision_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.model(config).float()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(path)
    return path


def phrase_tokenizer(phrases: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every phrase is one token and any other text falls back to bytes.

    No regular expression splits words first, so spaces and brackets merge too; a phrase that holds one of
    ``PLAIN_TOKENS`` is split there. Text that runs on after a phrase without a special token between can merge over
    the seam (``>`` with ``<``, say): make one phrase of what always stands together.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    pieces = set()
    for phrase in (*phrases, "system\n", "user\n", "assistant\n"):  # the words of ChatML itself
        for token in PLAIN_TOKENS:
            phrase = phrase.replace(token, "\0")
        pieces.update(piece for piece in phrase.split("\0") if piece)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + sum(len(piece.encode()) for piece in pieces),  # enough to merge every piece
        min_frequency=1,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(pieces), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _processor(kind: _Family, tokenizer: Any, source: str | Path | None, low: int | None, high: int | None) -> Any:
    """The family's processor. Limits in pixels: what was asked for, else ``source``'s, else 1 to 256 visual tokens."""
    token = (kind.patch * MERGE) ** 2
    limits = {"min_pixels": token, "max_pixels": 256 * token}
    real = Path(source) / "preprocessor_config.json" if source is not None else None
    if real is not None and real.exists():
        values = json.loads(real.read_text())
        limits.update({key: values[key] for key in limits if key in values})
    limits.update({key: value for key, value in zip(limits, (low, high), strict=True) if value is not None})
    images = Qwen2VLImageProcessor(patch_size=kind.patch, merge_size=MERGE, **limits, **kind.image_stats)
    videos = kind.video_processor(patch_size=kind.patch, merge_size=MERGE)
    template = tokenizer.chat_template or CHAT_TEMPLATE
    legacy = Path(source) / "chat_template.json" if source is not None else None
    if legacy is not None and legacy.exists():  # what a Qwen2.5-VL processor reads before the tokenizer's own
        template = json.loads(legacy.read_text())["chat_template"]
    return kind.processor(image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=template)


def _vocab_rows(tokenizer: Any, source: str | Path | None) -> int:
    """Rows of the embedding. Real checkpoints have more rows than tokens, and the rows left over can be sampled."""
    config = Path(source) / "config.json" if source is not None else None
    if config is None or not config.exists():
        return len(tokenizer)
    values = json.loads(config.read_text())
    return max(len(tokenizer), values.get("vocab_size") or values.get("text_config", {}).get("vocab_size", 0))


def _config(kind: _Family, tokenizer: Any, vocab: int, width: int, layers: int, vision_layers: int) -> Any:
    """The family's configuration with ``width`` / 64 heads in both towers and embeddings tied to the output."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    heads, inner = width // HEAD, 2 * width
    text = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **kind.rope},
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["endoftext"],
        "tie_word_embeddings": True,
        **kind.text,
    }
    vision = {
        "depth": vision_layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_heads": heads,
        "out_hidden_size": width,
        "patch_size": kind.patch,
        "spatial_merge_size": MERGE,
        **kind.vision,
    }
    markers = ("image_token_id", "image_pad"), ("video_token_id", "video_pad")
    edges = ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end")
    tokens = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in (*markers, *edges)}
    return kind.config(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vt_trl.tiny", description="Write a tiny checkpoint.")
    parser.add_argument("path", help="folder to write to")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="qwen2_5_vl")
    parser.add_argument("--tokenizer", help="folder with a real tokenizer, whose processor limits are taken too")
    parser.add_argument("--hidden-size", type=int, default=128, help="width, a multiple of 64")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m vt_trl.tiny DIR``."""
    args = _parser().parse_args(argv)
    options = {"family": args.family, "seed": args.seed, "hidden_size": args.hidden_size}
    print(build_tiny(args.path, tokenizer_dir=args.tokenizer, **options))


if __name__ == "__main__":
    main()
