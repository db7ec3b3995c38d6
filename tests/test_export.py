"""An export loads anywhere: published names, the trained policy's words, nothing of the trainer's in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from helpers import AsksFirst
from peft import PeftModel
from published import greedy, logits, replay, untrained
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from vt_trl import cli
from vt_trl.errors import ConfigError
from vt_trl.export import export
from vt_trl.hub import published_files
from vt_trl.run_notes import RunNotes

TOLERANCE = 1e-4  # absolute, on logits in fp32, between a merged adapter and one that is applied


def keys(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def load(folder: Path, **options):
    parts = AutoModelForImageTextToText, AutoProcessor, GenerationConfig
    model, processor, settings = (part.from_pretrained(folder, **options) for part in parts)
    return model.eval(), processor, settings


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def adapted(request, checkpoints, tmp_path_factory):
    """A policy with an adapter that matters, saved; its words in two turns."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("adapted")
    trainer = untrained(checkpoints[request.param], root, AsksFirst, lora="all", lora_r=4, lora_alpha=8)
    for name, value in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    trainer.save_model()
    return trainer, greedy(trainer, make_rows(2)), checkpoints[request.param]


def test_a_merged_adapter_is_the_policy_under_the_bases_names(adapted, tmp_path):
    trainer, rollouts, base = adapted
    out = export(trainer.args.output_dir, merge=True, out=tmp_path / "out")
    assert keys(out) == keys(base)
    model, processor, settings = load(out)
    assert model.dtype == torch.float32
    for rollout in rollouts:
        assert len(rollout.turns) == 2
        assert replay(model, processor, settings, rollout) == [turn.token_ids for turn in rollout.turns]
    plain, *_ = load(base)
    wanted, got, before = (
        logits(one, processor, rollouts[0], trainer.banned_ids) for one in (trainer.model, model, plain)
    )
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    assert (before - wanted).abs().max() > 1000 * TOLERANCE  # the adapter makes a difference


def test_an_adapter_goes_out_with_its_base_named(adapted, tmp_path):
    trainer, rollouts, base = adapted
    out = export(trainer.args.output_dir, out=tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (out / "model.safetensors").exists()
    model, processor, settings = load(out)  # plain transformers, with peft installed
    assert replay(model, processor, settings, rollouts[0]) == [turn.token_ids for turn in rollouts[0].turns]
    again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out).eval()
    assert replay(again, processor, settings, rollouts[0]) == [turn.token_ids for turn in rollouts[0].turns]
    with pytest.raises(ConfigError, match="nobody else has.*--merge"):
        export(trainer.args.output_dir, out=tmp_path / "two", push="me/adapter")


def test_banned_tokens_stay_banned(caller, tmp_path):
    trainer = untrained(caller, tmp_path)
    trainer.save_model()
    rollout = greedy(trainer, make_rows(1))[0]
    out = export(tmp_path / "out")
    assert out == tmp_path / "out-export" and keys(out) == keys(caller)
    assert not any("bias" in name and "lm_head" in name for name in keys(out))
    model, processor, settings = load(out)
    assert settings.suppress_tokens == trainer.banned_ids
    assert replay(model, processor, settings, rollout) == [turn.token_ids for turn in rollout.turns]
    # and without the list the same weights write placeholders
    settings.suppress_tokens = model.generation_config.suppress_tokens = None
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert replay(model, processor, settings, rollout)[0][0] == image_id
    settings.max_new_tokens = None
    settings.save_pretrained(tmp_path / "out")  # as a version that wrote no such list
    shutil.rmtree(out)
    (tmp_path / "out" / "vt_trl_files.json").write_text(json.dumps({}))
    assert GenerationConfig.from_pretrained(export(tmp_path / "out")).suppress_tokens == trainer.banned_ids


def test_a_run_of_full_weights(finished, checkpoint, tmp_path):
    out = export(finished.out, out=tmp_path / "out")
    assert keys(out) == keys(checkpoint)
    assert {path.name for path in out.iterdir()} == {path.name for path in published_files(finished.out)}
    assert (out / "chat_template.jinja").is_file() and (out / "tokenizer.json").is_file()
    assert load_file(out / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    model, *_ = load(out)
    assert all(torch.equal(value, finished.seen[2][name]) for name, value in model.state_dict().items())
    for path in out.iterdir():
        assert str(finished.root).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(("which", "step"), [("best", 2), ("last", 3), ("3", 3)])
def test_checkpoints_by_name(finished, which, step, tmp_path):
    out = export(finished.out, checkpoint=which, out=tmp_path / "out")
    model, *_ = load(out)
    assert all(torch.equal(value, finished.seen[step][name]) for name, value in model.state_dict().items())
    assert f"Step {step}." in (out / "README.md").read_text()
    notes, trained = RunNotes.read(out), RunNotes.read(finished.out)
    assert (notes.step, notes.environment) == (step, trained.environment) and trained.environment


def test_another_type_of_numbers(finished, tmp_path):
    out = export(finished.out, out=tmp_path / "out", dtype="bfloat16")
    saved = load_file(finished.out / "model.safetensors")
    assert all(
        torch.equal(value, saved[name].bfloat16()) for name, value in load_file(out / "model.safetensors").items()
    )
    assert AutoModelForImageTextToText.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_what_is_incomplete_is_refused(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.out, run)
    (run / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"checkpoint-3 is not complete.*4 bytes.*complete are checkpoint-2"):
        export(run, checkpoint="3")
    (run / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="model.safetensors is missing"):
        export(run)
    (run / "vt_trl_files.json").unlink()  # a run that was killed: the newest complete checkpoint
    assert "Step 2." in (export(run) / "README.md").read_text()
    with pytest.raises(ConfigError, match="no weights of step 7; there are: checkpoint-2, checkpoint-3"):
        export(run, checkpoint="7", out=tmp_path / "other")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(run)
    (run / "checkpoint-2" / "model.safetensors").rename(run / "checkpoint-2" / "model.bin")
    (run / "checkpoint-2" / "vt_trl_files.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights in the safetensors format"):
        export(run / "checkpoint-2", out=tmp_path / "other")


def test_nothing_half_written_is_left(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("vt_trl.export.render_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(finished.out, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(finished, tmp_path, capsys):
    assert cli.main(["export", str(finished.out), "--out", str(tmp_path / "out"), "--checkpoint", "best"]) == 0
    assert f"Written to {tmp_path / 'out'}" in capsys.readouterr().out
    assert cli.main(["export", str(finished.out), "--merge"]) == 2
    assert "no adapter" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing")]) == 2
    assert cli.main(["export", str(finished.out), "--private"]) == 2


@pytest.mark.vllm
def test_vllm_loads_it_and_says_the_same(adapted, tmp_path):
    pytest.importorskip("vllm")
    trainer, rollouts, _ = adapted
    export(trainer.args.output_dir, merge=True, out=tmp_path / "out")
    rollout = rollouts[0]
    rollout.images[0].save(tmp_path / "picture.png")
    start = len(rollout.prompt_ids)
    image_id = trainer.image_token_id
    prompt = [one for at, one in enumerate(rollout.prompt_ids) if one != image_id or rollout.prompt_ids[at - 1] != one]
    (tmp_path / "job.json").write_text(json.dumps({"prompt": prompt, "new": len(rollout.turns[0].token_ids)}))
    assert start > len(prompt)  # one placeholder per picture is what vLLM takes
    code = (
        "import json, sys; from pathlib import Path; from PIL import Image; from vllm import LLM, SamplingParams\n"
        "root, job = Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / 'job.json').read_text())\n"
        "llm = LLM(str(root / 'out'), dtype='float32', max_model_len=2048, gpu_memory_utilization=0.1,\n"
        "          enforce_eager=True, max_num_seqs=1)\n"
        "ban = json.loads((root / 'out' / 'generation_config.json').read_text())['suppress_tokens']\n"
        "settings = SamplingParams(temperature=0, max_tokens=job['new'], logit_bias={i: -100 for i in ban})\n"
        "given = {'prompt_token_ids': job['prompt'],\n"
        "         'multi_modal_data': {'image': Image.open(root / 'picture.png')}}\n"
        "said = llm.generate([given], settings)[0].outputs[0].token_ids\n"
        "(root / 'said.json').write_text(json.dumps(list(said)))\n"
    )
    (tmp_path / "job.py").write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert tuple(json.loads((tmp_path / "said.json").read_text())) == rollout.turns[0].token_ids
