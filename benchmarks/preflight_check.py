"""How far the preflight is from real allocations: ``python -m benchmarks.preflight_check``.

Tiny models of both families take one training step each, in every combination of batch, length, adapter and gradient
checkpointing, and every allocation is recorded: by torch's profiler on a CPU, by the caching allocator's statistics on
a GPU (``--device cuda``). Batches are padded, as with ``share_prefix: false``, or packed by this library itself.
The same step is estimated by :mod:`vt_trl.preflight`; relative errors are written down. With ``--config FOLDER``
layers as wide as those of a real model are measured, too: one decoder and two vision layers with random weights and a
small vocabulary. Last, this library's trainer generates twice, and the tensors it holds are compared.

Nothing is tuned per case: the formulas are those that ``vt-trl preflight`` uses.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from benchmarks.preflight_cases import Case, few_wide_layers, tiny_cases, wide_cases
from benchmarks.preflight_packed import packed_forward, packed_micro_batch
from benchmarks.preflight_trainer import trainer_rollouts
from vt_trl.families import Family, family_of
from vt_trl.fused_head import labelled_positions_only
from vt_trl.preflight.activations import MicroBatch
from vt_trl.preflight.counts import count, widths
from vt_trl.preflight.launch import Launch
from vt_trl.preflight.meter import Meter, nbytes
from vt_trl.preflight.precision import Precision, precision
from vt_trl.preflight.step import training_of, training_step
from vt_trl.recipe import RunArguments
from vt_trl.run import freeze_vision, lora_config
from vt_trl.tiny import FAMILIES, build_tiny

RESULT = Path("docs/results/preflight_cpu.json")
EXACT = ("weights", "gradients", "optimizer", "pixels")  # within 1%; the others are sums of many small tensors
NOTE = (
    "Bytes of one micro-batch. weights, gradients, optimizer, pixels: storages. kept: alive between forward and "
    "backward. passes: most during a forward without gradient. forward, backward: most during the halves of a "
    "training step, kept included; in tiny models the tile of the fused head (4096 x 32768 at most) is most of these "
    "three. error: estimated / measured - 1."
)


# Measuring


def measure(config: PretrainedConfig, model_path: Path | None, case: Case, device: torch.device) -> dict[str, int]:
    """Bytes of each part of one training step, as allocated."""
    family = family_of(config)
    run = _run(case)
    meter = Meter(device)
    model = _model(config, model_path, case, run, family, device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if case.autocast else nullcontext()
    if case.group:
        forward, pixels = packed_forward(config, model, case.groups(widths(config)), device, nullcontext())
    else:
        inputs = _inputs(config, case, device)
        forward, pixels = partial(model, **inputs), [inputs["pixel_values"]]
    with labelled_positions_only():
        loss(forward, autocast).backward()  # gradients exist from now on, as in every micro-batch but the first
        with meter.section("passes"), torch.no_grad(), autocast:
            forward()
        with meter.section("forward"):
            value = loss(forward, autocast)
        with meter.section("backward"):
            value.backward()
    del value
    gradients = nbytes(weight.grad for weight in trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    return {
        "weights": nbytes(model.parameters()),
        "gradients": gradients,
        "optimizer": nbytes(states),
        "pixels": nbytes(pixels),
        "kept": meter.live["forward"],
        "passes": meter.peak["passes"],
        "forward": meter.peak["forward"],
        "backward": meter.live["forward"] + meter.peak["backward"],
    }


def loss(forward: Callable[[], Any], autocast: Any) -> torch.Tensor:
    """A number that depends on every log-probability and entropy, as GRPO's loss does."""
    with autocast:
        output = forward()
        return (output.log_probs - 0.01 * output.entropy).sum()


def _run(case: Case) -> RunArguments:
    return RunArguments(
        model="-", dataset="-", dtype=case.dtype, lora=case.lora, lora_r=16, train_vision=case.train_vision
    )


def _model(
    config: PretrainedConfig, path: Path | None, case: Case, run: RunArguments, family: Family, device: torch.device
) -> Any:
    """The model as TRL's trainer would prepare it."""
    from peft import get_peft_model

    dtype = getattr(torch, case.dtype)
    if path is None:
        with torch.random.fork_rng():
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    adapter = lora_config(run, family)
    if adapter is not None:
        model = get_peft_model(model, adapter)
        if case.checkpointing:
            model.enable_input_require_grads()
    elif not run.train_vision:
        freeze_vision(model, family)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def _inputs(config: PretrainedConfig, case: Case, device: torch.device) -> dict[str, Any]:
    """A batch like the trainer's: one picture per sample; the second half of the text is the completion."""
    w = widths(config)
    rows, columns = case.grid(w)
    visual = rows * columns // w.merge**2
    length = visual + case.text
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (case.samples, length), generator=generator)
    ids[:, 8 : 8 + visual] = config.image_token_id
    mask = torch.ones_like(ids)
    if case.padded:
        mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length - case.text // 2] = -100
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "labels": labels,
        "pixel_values": torch.rand(case.samples * rows * columns, w.patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * case.samples),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()} | {"fused_lm_head": True}


# Estimating


def _precision(case: Case) -> Precision:
    """What :func:`vt_trl.preflight.precision.precision` says of a plain run with these settings."""
    args = SimpleNamespace(bf16=case.autocast, fp16=False, optim="adamw_torch")
    return precision(_run(case), args, Launch())


def estimated(config: PretrainedConfig, case: Case, triton: bool) -> dict[str, int]:
    """The same parts from the formulas of the preflight."""
    run = _run(case)
    w, counts = widths(config), count(config, run)
    p = _precision(case)
    rows, columns = case.grid(w)
    patches = case.samples * rows * columns
    length = rows * columns // w.merge**2 + case.text
    labelled = case.samples * (case.text // 2)
    batch = MicroBatch(case.samples, length, labelled, patches, case.samples, case.padded)
    if case.group:
        batch = packed_micro_batch(config, case.groups(w), gathered=triton and p.residual == 2)
    training = training_of(run, counts, case.checkpointing, "sdpa")
    step = training_step(w, counts, batch, p, training, triton)
    frozen = counts.total - counts.trained
    return {
        "weights": counts.trained * p.trained + frozen * p.frozen,
        "gradients": counts.trained * p.gradient,
        "optimizer": round(counts.trained * p.state),
        "pixels": batch.patches * w.patch * 4,
        "kept": step.kept,
        "passes": step.passes,
        "forward": step.forward,
        "backward": step.backward,
    }


# Comparing


def compare(measured: dict[str, int], estimate: dict[str, int]) -> dict[str, dict[str, float]]:
    """Both figures in bytes and the relative error of the estimate, per part."""
    return {
        part: {
            "measured": measured[part],
            "estimated": estimate[part],
            "error": round(estimate[part] / measured[part] - 1, 4) if measured[part] else 0.0,
        }
        for part in measured
    }


def check_model(
    config: PretrainedConfig, path: Path | None, cases: Sequence[Case], device: torch.device
) -> dict[str, Any]:
    """Every case of one model: name -> part -> figures."""
    triton = device.type == "cuda"
    return {case.name: compare(measure(config, path, case, device), estimated(config, case, triton)) for case in cases}


def worst(results: dict[str, Any]) -> dict[str, float]:
    """The largest error of each part over all cases, signed."""
    errors: dict[str, float] = {}
    for cases in results.values():
        for parts in cases.values():
            for part, figures in parts.items():
                errors[part] = max(errors.get(part, 0.0), figures["error"], key=abs)
    return errors


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preflight_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128], help="widths of the tiny models")
    parser.add_argument(
        "--config", type=Path, nargs="*", default=[], help="folders with configurations of real models"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, compare, write and print; returns what was written."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse_args(argv)
    torch.set_num_threads(options.threads)
    device, results = torch.device(options.device), {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for hidden in options.hidden:
                path = build_tiny(
                    Path(folder) / f"{family}-{hidden}", family, hidden_size=hidden, layers=4, vision_layers=4
                )
                config = AutoConfig.from_pretrained(path)
                results[f"tiny {family}, hidden {hidden}"] = check_model(config, path, tiny_cases(), device)
            results[f"trainer, tiny {family}"] = {"two generations": compare(*trainer_rollouts(path))}
    for folder in options.config:
        config = few_wide_layers(AutoConfig.from_pretrained(folder))
        name = f"layers of {folder.name}: 1 decoder, 2 vision"
        results[name] = check_model(config, None, wide_cases(), device)
    from demos.reading.stages import provenance

    report = {
        "note": NOTE,
        "worst_error": worst(results),
        "results": results,
        "command": shlex.join(["python", "-m", "benchmarks.preflight_check", *map(_last_name, argv)]),
        **provenance(),
        **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: worst relative error per part: {report['worst_error']}")
    return report


def _last_name(word: str) -> str:
    """Folders by their names: where they lie is no part of a result."""
    return word if word.startswith("-") else Path(word).name


if __name__ == "__main__":
    main()
