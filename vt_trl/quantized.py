"""QLoRA: a base in 4 bits that is never trained, and its weights as the engine needs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig

from vt_trl.errors import ConfigError
from vt_trl.families import Family


def four_bits(compute_dtype: torch.dtype, family: Family) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314, Section 3) for the language model's linear layers.

    The vision tower and the head stay as they are: they are small, and what the policy sees and says hangs on them.
    Raises ConfigError when bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("quantize is nf4, which needs bitsandbytes. Install vt-trl[qlora], or set quantize: none.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[family.vision_module, "lm_head"],
    )


def is_quantized(model: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


@torch.no_grad()
def whole_weights(model: PeftModel, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and weight of every parameter of the base, adapter added, as training computes with it.

    Merging in place would round the sum to 4 bits again, which the policy's own forward does not. Names are those of
    the base; tensors that were quantised come in ``dtype`` and are made one at a time.
    """
    from bitsandbytes.functional import dequantize_4bit

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():
        owner, _, kind = name.rpartition(".")
        if ".lora_" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        weight = parameter.data if state is None else dequantize_4bit(parameter.data, state).to(dtype)
        layer = layers.get(owner.removesuffix(".base_layer"))
        if layer is not None and kind == "weight":
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield f"{owner.removesuffix('.base_layer')}.{kind}", weight
