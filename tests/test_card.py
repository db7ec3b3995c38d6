"""The model card: what it says of a run, and that nothing a policy or a data set wrote can change what it is."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from conftest import picture
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from published import TOKEN, untrained

from vt_trl.card import dialogue, fence, plain, render_card
from vt_trl.envs import DirectEnv, ZoomEnv
from vt_trl.export import export
from vt_trl.images import ResolutionRule
from vt_trl.play import printable
from vt_trl.redact import without_keys
from vt_trl.run_notes import FILE, RunNotes, cleaned, example_of, licence_of, place, summary

HOSTILE = "```\n---\nlicense: evil\n---\n<script>alert(1)</script>\n# Heading\n````` | [x](javascript:x)"


def example(text: str) -> dict:
    shown = [{"role": "user", "parts": [{"picture": [56, 28]}, {"text": "What?"}]}]
    said = [{"role": "assistant", "parts": [{"text": text}]}]
    return {"step": 1, "messages": shown + said, "status": "answered", "reward": 1.0, "rank": [1, 1, 1, 1]}


def tokens(card: str) -> list:
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return [inner for token in MarkdownIt().enable("table").parse(body) for inner in [token, *(token.children or [])]]


def check_harmless(card: str, text: str) -> None:
    found = tokens(card)
    assert not [token for token in found if token.type in ("html_block", "html_inline")]
    links = [token.attrs["href"] for token in found if token.type == "link_open"]
    assert all(link.startswith("https://") for link in links)
    assert printable(dialogue(example(text))).rstrip("\n") + "\n" in [
        token.content for token in found if token.type == "fence"
    ]


def test_a_hostile_completion_stays_text():
    card = render_card(RunNotes(example=example(HOSTILE)), "me/model")
    check_harmless(card, HOSTILE)
    assert "license" not in ModelCard(card).data.to_dict()
    assert [token.content for token in tokens(card) if token.type == "inline"].count("Heading") == 0


@settings(max_examples=60)
@given(st.text(alphabet="`~<>-# \n|[]():abc\t\\&\r\x1b"))
def test_no_completion_leaves_its_block(text):
    check_harmless(render_card(RunNotes(example=example(text)), "me/model"), text)


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_no_name_becomes_markup(text):
    notes = RunNotes(
        base_model=text, data=[{"name": text, "use": text, "rows": 1, "split": text}], licence={"license": text}
    )
    card = render_card(notes, f"me/{text}")
    data = ModelCard(card).data.to_dict()
    assert set(data) <= {
        *("base_model", "base_model_relation", "library_name", "license", "pipeline_tag", "tags", "datasets"),
        "model-index",
        "model_name",
    }
    assert all(
        token.type not in ("html_block", "html_inline", "link_open")
        or token.attrs.get("href", "").startswith(
            ("https://arxiv.org/abs/2507.13348", "https://github.com/huggingface/trl")
        )
        for token in tokens(card)
    )


def test_escaping():
    assert plain("a|b\n<c> `d`") == r"a\|b \<c\> \`d\`"
    assert fence("a ``` b", "text") == "````text\na ``` b\n````"
    assert fence("\x1b[31mred") == "```\n\N{REPLACEMENT CHARACTER}[31mred\n```"


def test_settings_are_cleaned():
    given = {
        "hub_token": "secret-word",
        "env": {"OPENAI_API_KEY": "abc", "VLLM_CPU_KVCACHE_SPACE": "1"},
        "max_turn_tokens": 64,
        "judge_args": {"base_url": "https://u:p4ss@host.org/v1", "note": "word secret-word here"},
        "dataset": "/home/someone/rows",
        "paths": ["~/x/y", "relative/z", "a /tmp/b/c d", "https://hf.co/org/name"],
        "eos_token": "<|im_end|>",
        "prompts": {"after_image": "\n</tool_response>\nAnswer inside <answer> </answer>, from </home/me/x>."},
    }
    assert cleaned(given, ["secret-word"]) == {
        "hub_token": "***",
        "env": {"OPENAI_API_KEY": "***", "VLLM_CPU_KVCACHE_SPACE": "1"},
        "max_turn_tokens": 64,
        "judge_args": {"base_url": "https://***@host.org/v1", "note": "word *** here"},
        "dataset": "<local>/rows",
        "paths": ["<local>/y", "relative/z", "a <local>/c d", "https://hf.co/org/name"],
        "eos_token": "<|im_end|>",
        "prompts": {"after_image": "\n</tool_response>\nAnswer inside <answer> </answer>, from <<local>/x>."},
    }
    assert place("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert place("/data/models/tiny") == place("tests").replace("tests", "tiny") == "<local>/tiny"
    assert without_keys("hf_abcdefghij", []) == "***"


def test_metrics_are_the_last_and_the_highest():
    history = [
        {"step": 1, "reward": 0.5, "loss": 1.0},
        {"step": 2, "reward": 1.5, "eval_accuracy": 0.25},
        {"step": 3, "reward": float("nan")},
        {"step": 4, "reward": 1.0},
    ]
    assert summary(history) == {
        "reward": {"last": 1.0, "last_step": 4, "highest": 1.5, "highest_step": 2},
        "eval_accuracy": {"last": 0.25, "last_step": 2, "highest": 0.25, "highest_step": 2},
    }


def test_a_licence_is_that_of_the_bases_card(tmp_path):
    assert licence_of(str(tmp_path)) == {} == licence_of("nobody/nothing")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\ntags: [x]\n---\nText")
    assert licence_of(str(tmp_path)) == {"license": "other", "license_name": "qwen"}


def test_the_front_matter_is_what_the_hub_reads():
    notes = RunNotes(
        base_model="Qwen/Qwen2.5-VL-7B-Instruct",
        licence={"license": "apache-2.0"},
        data=[{"name": name, "use": "training", "rows": 3} for name in ("org/rows", "<local>/mine")],
        adapter=True,
    )
    data = ModelCard(render_card(notes, "me/model")).data
    assert data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.license, data.datasets) == ("peft", "apache-2.0", ["org/rows"])
    assert data.pipeline_tag == "image-text-to-text" and {"trl", "grpo", "vt_trl"} <= set(data.tags)
    merged = ModelCard(render_card(notes, "me/model", merged=True)).data
    assert merged.library_name == "transformers" and merged.to_dict()["base_model_relation"] == "finetune"


def test_the_card_of_a_run(finished):
    card = (finished.out / "README.md").read_text()
    text = card.replace("\\", "")
    assert "Step 2. By eval_accuracy the best evaluated step was 2 (1): these weights." in text
    assert "| eval_accuracy | 0 (3) | 1 (2) |" in text
    assert "| rows for training | 4 of <local>/rows |" in text and "| rows for evaluation | 4 of" in text
    assert "CPU, 1 process |" in text and "| transformers | " in text and "| trl | 1.16" in text
    for arxiv in ("2507.13348", "2505.16192", "2503.17352"):
        assert arxiv in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL).group(1))
    assert recipe["num_generations"] == 4 and recipe["hub_token"] == "***"
    assert recipe["dataset"] == "<local>/rows" and recipe["output_dir"] == "<local>/out"
    episode = re.search(r"```+text\n(.*?)\n```+\n", card, re.DOTALL).group(1)
    assert episode.count("[picture, ") == 2 and "[picture, 56 x 56 pixels]" in episode  # 112 x 112 at half its sides
    assert len(re.findall("^assistant$", episode, re.MULTILINE)) == 2 and "[picture, 112 x 112 pixels]" in episode
    check_no_leaks(finished.out, finished.root)


def check_no_leaks(out: Path, root: Path) -> None:
    for path in [path for path in out.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        assert TOKEN.encode() not in data, path
        if path.name in ("README.md", FILE):
            assert str(root).encode() not in data and os.path.expanduser("~").encode() not in data


def test_every_checkpoint_has_its_own_card_and_notes(finished):
    names = sorted(path.name for path in finished.out.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]  # save_total_limit, and the best is kept
    for step in (2, 3):
        folder = finished.out / f"checkpoint-{step}"
        assert f"Step {step}." in (folder / "README.md").read_text()
        assert RunNotes.read(folder).step == step
    notes = RunNotes.read(finished.out)
    assert notes.best == {"metric": "eval_accuracy", "value": 1.0, "step": 2} and notes.step == 2
    assert notes.seconds > 0 and notes.hardware and sum(notes.hardware.values()) == 1
    assert notes.metrics["eval_accuracy"]["highest_step"] == 2


def test_an_example_holds_no_pixels_and_no_keys(finished):
    trainer = finished.trainer
    made = example_of(trainer.last_rollouts[0], trainer.recorder.last_records[0], step=7, secrets=["Full:"])
    sizes = [part["picture"] for one in made["messages"] for part in one["parts"] if "picture" in part]
    assert sizes == [[56, 56], [112, 112]] and "***" in str(made["messages"]) and made["step"] == 7


@given(st.integers(60, 3000), st.integers(60, 3000))
def test_the_snippets_views_are_those_of_training(width, height):
    rule = ResolutionRule(max_pixels=512 * 512, min_pixels=128 * 128)
    if max(width, height) > 4 * min(width, height):
        return
    notes = RunNotes(environment={
        "kind": "resize", "resolution": "low", "max_turn_tokens": 8, "rule": vars(rule),
        "prompts": {"system": "s", "task": "{question}", "before_image": "b", "after_image": "a"},
    })  # fmt: skip
    code = re.search(r"def views\(image\):.*?\n\n", render_card(notes, "me/model"), re.DOTALL).group(0)
    names = {"isqrt": __import__("math").isqrt, "Image": type("Image", (), {"LANCZOS": 1})}
    exec(code, names)  # our own template

    class Sized:
        size = (width, height)

        def resize(self, size, how):
            return size

    full = rule.full_size(width, height)
    low, large = names["views"](Sized())
    assert large == (2 * low[0], 2 * low[1])
    assert all(abs(shown - wanted) <= 2 for shown, wanted in zip(large, full, strict=True))
    if max(full) < max(width, height):  # pictures that are shrunk: to the pixel
        assert large == full


@pytest.mark.parametrize("environment", ["resize", "direct", "zoom"])
def test_the_snippet_runs_on_the_export(caller, tmp_path, monkeypatch, capsys, environment):
    kinds = {"direct": {"environment": DirectEnv}, "zoom": {"environment": partial(ZoomEnv, turns=2)}}
    kinds = kinds.get(environment, {})
    trainer = untrained(caller, tmp_path, **kinds)
    trainer.save_model()
    out = export(tmp_path / "out", out=tmp_path / "mine")
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    picture(3, (112, 56)).save("picture.png")
    names: dict = {}
    exec(code, names)  # our own template
    if environment == "zoom":
        assert names["pipe"].policy == "zoom"
        assert [turn.text for turn in names["result"].turns] and str(names["result"].answer) in capsys.readouterr().out
        return
    if environment == "direct":
        assert len(names["messages"]) == 2
        return
    assert names["low"].size == (56, 28) and names["full"].size == (112, 56)
    assert [one["role"] for one in names["messages"]] == ["system", "user", "assistant", "user"]
    assert names["messages"][2]["content"].startswith("<tool_call>")
    assert capsys.readouterr().out.strip() == names["answer"] != ""
