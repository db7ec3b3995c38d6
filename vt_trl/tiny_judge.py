"""A tiny judge that works: a Qwen3 of half a million weights, trained to compare two strings in about a minute.

``vt_trl.tiny`` writes models that know nothing, which is enough for a policy that is about to be trained, but a judge
has to judge. ``build_tiny_judge`` trains one from generated cases to say yes when the answer is one of the accepted
answers, letter by letter and in either case, and no to everything else: near misses, answers wrapped into more text,
lists, garbage, pleas. It knows nothing of meaning. Its prompts are those of
:class:`vt_trl.judges.local.LocalJudge`, so it stands in for a real judge wherever one is configured, offline::

    python -m vt_trl.tiny_judge DIR [--seed 0] [--steps 700]

Two things make a minute enough. Every position of an answer is trained, not only its end: do the letters so far begin
an accepted answer? And attention starts where comparing needs it: first heads that look one, two letters back, then
heads whose queries and keys are the same map, so that equal letters find each other. A letter starts out alike in
either case; left to be learned, that cost one pair of different letters in about five hundred.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vt_trl.judges.base import Case
from vt_trl.judges.local import LocalJudge
from vt_trl.judges.prompt import RUBRIC, YES_NO_REPLY
from vt_trl.muon import MuonAndAdam
from vt_trl.tiny import HEAD
from vt_trl.tiny_cases import Cases, is_right

_THINK = "<think>\n\n</think>\n\n"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# One token each: the frame of the judge's prompt, and what stands between the fields of a case.
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_FRAME = (
    f"<|im_start|>system\n{RUBRIC}\n{YES_NO_REPLY}<|im_end|>\n<|im_start|>user\n",
    f"<|im_end|>\n<|im_start|>assistant\n{_THINK}",
)
_QUESTION, _GOLDS, _NEXT, _ANSWER = '{"question": "', '", "accepted_answers": ["', '", "', '"], "answer_to_grade": "'
_ROPE_THETA = 1e6  # most pairs of dimensions turn so slowly that letters are compared wherever they stand


@dataclass(frozen=True)
class _Size:
    width: int = 128
    inner: int = 128
    layers: int = 3
    heads: int = 3
    tokens: int = 1000  # per step
    matrix_rate: float = 0.01
    other_rate: float = 0.01
    easy: float = 0.2  # share of the steps that compare bare strings of growing length


def judge_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a token for each fixed piece of the judge's prompt, so that a prompt is a few dozen tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    special = (*_CONTROL, *_FRAME, "yes", "no")
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    pieces = (_QUESTION, _GOLDS, _NEXT, _ANSWER)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE,
    )


def build_tiny_judge(
    path: str | Path, seed: int = 0, steps: int = 700, progress: Callable[[int, float], Any] = lambda step, loss: None
) -> Path:
    """Write a trained tiny judge to ``path`` and return the path; the caller's random state is left as it was.

    ``progress(steps done, loss)`` is called after each step.
    """
    path, size = Path(path), _Size()
    tokenizer = judge_tokenizer()
    tokenizer.save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_config(tokenizer, size))
        _structure(model, tokenizer, size)
        model.save_pretrained(path)
        judge = LocalJudge(str(path), backend="transformers", device="cpu")
        judge.open()  # its prompts are the ones to train on
        _fit(model, _batches(judge, tokenizer, Cases(seed), size, steps), size, steps, progress)
    model.eval().save_pretrained(path)
    return path


def _config(tokenizer: PreTrainedTokenizerFast, size: _Size) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=HEAD,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def _structure(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, size: _Size) -> None:
    """Where attention starts. Embedding dimension 0 is on for every token, dimension 1 for what begins a field.

    Layer 0: a constant query and a key turned by rotary position look one letter back (head 0) or two (head 1); the
    last head looks at what begins the field. Layer 1: queries and keys are one orthogonal map, weak in the dimensions
    that turn fast.
    """
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.1)
    lower, upper = (tokenizer.convert_tokens_to_ids(list(case)) for case in (ascii_lowercase, ascii_uppercase))
    embedding[upper] = embedding[lower] + 0.03 * torch.randn(len(lower), size.width)
    embedding[:, 0], embedding[:, 1] = 0.4, 0
    begins = tokenizer.convert_tokens_to_ids([_QUESTION, _GOLDS, _NEXT, _ANSWER])
    for token in begins[2:]:  # fields that are compared begin alike, so that first letters match as others do
        embedding[token] = embedding[begins[1]] + 0.03 * torch.randn(size.width)
    embedding[begins, 1] = 0.4
    pairs, turn = HEAD // 2, [_ROPE_THETA ** (-2 * pair / HEAD) for pair in range(HEAD // 2)]
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    for head in range(size.heads):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        query, key = first.q_proj.weight[rows], first.k_proj.weight[rows]
        query.normal_(0, 0.005), key.normal_(0, 0.005)
        if head < size.heads - 1:
            for pair in range(3):  # the ones that turn fastest tell neighbours apart
                angle = torch.tensor((head + 1) * turn[pair])
                query[pair, 0] += 1
                key[pair, 0] += torch.cos(angle)
                key[pair + pairs, 0] += torch.sin(angle)
        else:
            query[8:20, 0] += 1
            key[8:20, 1] += 1
        first.v_proj.weight[rows] = _orthogonal(HEAD, size.width)
        first.o_proj.weight[:, rows] = 0.2 * _orthogonal(size.width, HEAD)
        same = _orthogonal(HEAD, size.width)
        same[:10] *= 0.1
        same[pairs : pairs + 10] *= 0.1
        second.q_proj.weight[rows], second.k_proj.weight[rows] = same, same
    for norm in (first.q_norm, first.k_norm, second.q_norm, second.k_norm):
        norm.weight *= 1.4  # sharper than softmax over random keys would begin


def _orthogonal(rows: int, columns: int) -> torch.Tensor:
    return torch.nn.init.orthogonal_(torch.empty(rows, columns))


def _batches(
    judge: LocalJudge, tokenizer: PreTrainedTokenizerFast, cases: Cases, size: _Size, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (B, L) and labels (B, L) of cases of similar length; labels are -100 outside answers."""
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    pool: list[list[Case]] = []
    for step in range(steps):
        share = step / steps
        easy = share < size.easy
        longest = 1 + int(4 * share / size.easy) if easy else 6
        if not pool or (easy and step % 10 == 0):
            made = [cases.easy(longest) if easy else cases.case() for _ in range(640)]
            pool = _by_length(made, judge, size.tokens)
            cases.random.shuffle(pool)
        chosen = pool.pop()
        ids = [judge.prompt_ids(case) for case in chosen]
        labels = [_labels(tokenizer, one, yes, no) for one in ids]
        for case, label in zip(chosen, labels, strict=True):
            label[-1] = yes if is_right(case) else no
        yield tuple(
            pad_sequence([torch.tensor(one) for one in side], batch_first=True, padding_value=value)
            for side, value in ((ids, tokenizer.pad_token_id), (labels, -100))
        )


def _by_length(cases: Sequence[Case], judge: LocalJudge, tokens: int) -> list[list[Case]]:
    """Batches of at most ``tokens`` tokens, padding included."""
    batches: list[list[Case]] = [[]]
    for length, case in sorted(((len(judge.prompt_ids(case)), case) for case in cases), key=lambda pair: pair[0]):
        if batches[-1] and (len(batches[-1]) + 1) * length > tokens:
            batches.append([])
        batches[-1].append(case)
    return batches


def _labels(tokenizer: PreTrainedTokenizerFast, ids: list[int], yes: int, no: int) -> list[int]:
    """For every token of the answer: do the letters so far begin an accepted answer?"""
    golds_at, next_id, answer_at = tokenizer.convert_tokens_to_ids([_GOLDS, _NEXT, _ANSWER])
    start = len(ids) - 1 - ids[::-1].index(answer_at)
    first = len(ids[:start]) - 1 - ids[:start][::-1].index(golds_at)
    letters = tokenizer.convert_ids_to_tokens(ids)
    golds = [""]
    for index in range(first + 1, start):
        if ids[index] == next_id:
            golds.append("")
        else:
            golds[-1] += letters[index].lower()
    labels, said = [-100] * len(ids), ""
    for index in range(start + 1, len(ids) - 1):
        said += letters[index].lower()
        labels[index] = yes if any(f'{gold}"}}'.startswith(said) for gold in golds) else no  # "} ends the object
    return labels


def _fit(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    size: _Size,
    steps: int,
    progress: Callable[[int, float], Any],
) -> None:
    optimizer = MuonAndAdam(model, size.matrix_rate, size.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step, (ids, labels) in enumerate(batches):
        rate = min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps) + 0.02)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        trained = labels >= 0
        last = trained & (trained.flip(1).cumsum(1).flip(1) == 1)
        loss = F.cross_entropy(model.lm_head(hidden[last]), labels[last])
        along = trained & ~last
        if along.any():
            loss = loss + F.cross_entropy(model.lm_head(hidden[along]), labels[along])
        loss.backward()
        optimizer.step(rate)
        progress(step + 1, loss.item())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vt_trl.tiny_judge", description="Train a tiny judge.")
    parser.add_argument("path", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of weights and cases")
    parser.add_argument("--steps", type=int, default=700)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m vt_trl.tiny_judge DIR``."""
    options = parse_args(argv)
    print(build_tiny_judge(options.path, options.seed, options.steps))


if __name__ == "__main__":
    main()
