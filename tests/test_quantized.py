"""QLoRA: what is held in 4 bits, that the engine gets what training computes with, and a run from a recipe."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.nn import Linear4bit
from conftest import picture
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vt_trl import run as runs
from vt_trl.errors import ConfigError
from vt_trl.families import family_of
from vt_trl.generation.vllm_common import EngineWeights
from vt_trl.preflight.counts import count
from vt_trl.preflight.states import NF4
from vt_trl.quantized import four_bits, is_quantized, whole_weights
from vt_trl.recipe import RunArguments

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def load(path, **settings):
    """The policy of a recipe: base in 4 bits, an adapter that is not zero."""
    run = RunArguments(
        model=str(path), dataset="-", lora="language", lora_r=4, quantize="nf4", dtype="float32", **settings
    )
    config = AutoConfig.from_pretrained(path)
    family = family_of(config)
    quantization = four_bits(torch.float32, family)
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    policy = get_peft_model(model, runs.lora_config(run, family))
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return policy.eval(), run, config


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request, checkpoints):
    return (*load(checkpoints[request.param]), checkpoints[request.param])


def forward(model, path):
    processor = AutoProcessor.from_pretrained(path)
    text = f"<|vision_start|>{processor.image_token}<|vision_end|>what is it"
    inputs = processor(text=[text], images=[picture(3)], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_linear_layers_of_the_language_model_are_in_4_bits_and_nothing_else(policy):
    model, run, config, _ = policy
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert packed and all("language_model.layers" in name for name in packed)
    layers = config.get_text_config().num_hidden_layers
    assert len(packed) == 7 * layers  # query, key, value, output, gate, up, down
    numbers = count(config, run)
    held = sum(
        module.weight.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
        for module in packed.values()
        for state in [module.weight.quant_state]
    )
    # The preflight's bytes; a tiny matrix rounds its few scales up to whole blocks.
    assert held == pytest.approx(numbers.language_matrices * NF4, rel=0.02)


def test_the_engine_gets_what_training_computes_with(policy):
    """A plain model with the engine's weights gives the policy's logits; merging in place would not."""
    model, _, _, path = policy
    plain = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    before = forward(plain, path)
    sent = dict(whole_weights(model, torch.float32))
    names = dict(plain.named_parameters())
    assert sent.keys() == names.keys()
    assert all(sent[name].shape == weight.shape for name, weight in names.items())
    plain.load_state_dict(sent, strict=False)
    logits = forward(model, path)
    assert (logits - before).abs().max() > 0.1  # quantisation and adapter do change it
    torch.testing.assert_close(forward(plain, path), logits, atol=2e-4, rtol=1e-3)


def test_a_policy_in_4_bits_reaches_an_engine_whole(policy):
    model = policy[0]
    engine = EngineWeights.__new__(EngineWeights)
    engine.model, engine.accelerator = model, Accelerator(cpu=True)
    assert is_quantized(model)
    sent = dict(engine._iter_named_params())
    assert all(weight.is_floating_point() for weight in sent.values())
    assert not any("lora" in name or "base_layer" in name for name in sent)


def test_settings_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="quantize is nf4 and lora is none"):
        RunArguments(model="m", dataset="d", quantize="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Install vt-trl\[qlora\]"):
        four_bits(torch.float32, None)


def test_a_recipe_trains_the_adapter_of_a_base_in_4_bits(checkpoint, folder, tmp_path):
    source = folder({"image": "images/0.png", "question": "What?", "answer": "1"})
    options = (
        f"--model {checkpoint} --dataset {source} --output_dir {tmp_path / 'out'} --dtype float32 --lora language"
    )
    options += " --quantize nf4 --max_steps 2 --environment_args {} --report_to none --learning_rate 1e-2"
    smoke = runs.Path(__file__).resolve().parents[1] / "recipes" / "smoke.yaml"
    trainer = runs.train(smoke, options.split())
    assert trainer.state.global_step == 2 and is_quantized(trainer.model)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
