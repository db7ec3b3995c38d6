"""Captioner and reasoner on vLLM: what transformers says, samples that differ, one engine at a time."""

from __future__ import annotations

import json
import os

import psutil
import pytest
from test_traces import rejected, write_rows

from data_prep import distill
from data_prep.local_speaking import LocalSpeaker
from data_prep.speaking import Ask
from vt_trl.envs.base import system, user

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("own_cache")]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

PLAIN = {"backend": "transformers", "device": "cpu", "dtype": "float32", "max_batch": 8}
ENGINE = {"backend": "vllm", "dtype": "float32", "max_batch": 8, "gpu_memory_utilization": 0.1}
CONTEXT = {"context": 160}


def ask(name: str, *parts, sample: int = 0) -> Ask:
    return Ask(name, (system("Say."), user(*parts)), sample)


def engines() -> list[psutil.Process]:
    """vLLM's processes below this one that run; those that were killed may wait to be collected."""
    below = psutil.Process().children(recursive=True)
    return [one for one in below if one.status() != psutil.STATUS_ZOMBIE and "EngineCore" in " ".join(one.cmdline())]


def test_a_text_model_says_what_it_says_on_transformers_and_draws_each_sample_for_itself(mind):
    questions = [ask(word, word) for word in ("What?", "Which?", "How many?", "x<|im_end|>y")]
    plain, model = (LocalSpeaker(str(mind), "--args", 0.0, 12, 0, None, one | CONTEXT) for one in (PLAIN, ENGINE))
    assert model.say(questions) == plain.say(questions)
    assert engines() and "leaves no room" in model.say([ask("long", "long " * 100)])[0]
    model.temperature = 1.0
    asks = [ask("a", "What?", sample=sample) for sample in range(4)]
    four = model.say(asks)
    assert len({one.text for one in four}) == 4 and model.say(asks[2:]) == four[2:]
    model.close()
    assert not engines()


@pytest.mark.slow  # two engines
def test_both_on_vllm_from_the_command_to_the_report(checkpoint, mind, tmp_path):
    rows, out = write_rows(tmp_path / "rows", None, None), tmp_path / "out"
    words = ["--dataset", rows, "--captioner", "local", "--captioner-model", checkpoint, "--reasoner", "local"]
    words += ["--reasoner-model", mind, "--captioner-args", json.dumps(ENGINE)]
    words += ["--reasoner-args", json.dumps(ENGINE | {"context": 2048}), "--caption-tokens", 8, "--max-tokens", 12]
    words += ["--caption-pixels", 12544, "--temperature", 1.0, "--out", out]
    distill.run(distill.parser().parse_args(list(map(str, words))))
    lost = rejected(out)
    assert sorted((one["id"], one["sample"]) for one in lost) == [(id, n) for id in ("r1", "r2") for n in range(4)]
    assert len({one["replies"][0] for one in lost}) == 8
    report = json.loads((out / "report.json").read_text())
    assert report["spent"]["captioner"]["replies"] == 2 and not engines()
