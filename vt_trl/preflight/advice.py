"""What to change when a run does not fit: the fewest and mildest settings with which it does.

Every move is tried by estimating again. Moves come in the order of what they cost: first those that change nothing but
memory, then those that cost time, then those that change what is trained. Moves that turn out not to be needed are
taken back, the costliest first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vt_trl.envs import ENVIRONMENTS
from vt_trl.judges import LocalJudge, make_judge
from vt_trl.preflight.changes import CONFIG, SHARING, Change, changed
from vt_trl.preflight.estimate import Estimate, estimate
from vt_trl.preflight.setup import Setup
from vt_trl.preflight.states import syncs_each_batch

Which = Literal["longest", "typical"]

LEAST_PIXELS = 512 * 512
LEAST_TURN = 256  # sampled tokens
STEP = 0.01  # of vLLM's share
PACKED = 32_768  # tokens of one forward: more than a typical group has


@dataclass(frozen=True)
class Advice:
    """Changes that together make a run fit, and what it then needs. ``enough``: whether they do."""

    which: Which
    changes: tuple[Change, ...]
    after: Estimate
    enough: bool

    def overrides(self) -> list[str]:
        """The changes of recipe settings as ``--key value``."""
        import json

        words = []
        for change in self.changes:
            if change.setting not in (CONFIG, "model"):
                value = change.value
                words += [f"--{change.setting}", json.dumps(value) if isinstance(value, dict | bool) else str(value)]
        return words


@dataclass(frozen=True)
class Move:
    """A step towards a smaller run: returns the changed setup and what to write, or None when it has nothing to do."""

    apply: Callable[[Setup, Estimate, Which], tuple[Setup, list[Change]] | None]
    repeat: bool = False


def advise(setup: Setup, which: Which, before: Estimate | None = None) -> Advice | None:
    """Changes with which the ``which`` rollouts fit; None when they fit already or no GPU is known."""
    first = before or estimate(setup)
    if not _excess(first, which):
        return None
    chosen = _search(setup, first, which)
    after = _apply(setup, chosen, which)
    if not _excess(after.estimate, which):
        for move in reversed(list(chosen)):  # is it still needed, now that all the others are there?
            fewer = [one for one in chosen if one is not move]
            tried = _apply(setup, fewer, which)
            if not _excess(tried.estimate, which):
                chosen, after = fewer, tried
        after = _fill_up(after, which, setup.args.vllm_gpu_memory_utilization)
    changes, enough = after.changes, not _excess(after.estimate, which)
    if not enough:
        changes = [*changes, _smaller_model(after.estimate, which)]
    return Advice(which, tuple(_last_of_each(changes)), after.estimate, enough)


@dataclass
class _Trial:
    estimate: Estimate
    changes: list[Change]


def _excess(estimated: Estimate, which: Which) -> int:
    return estimated.excess(getattr(estimated, which))


def _search(setup: Setup, first: Estimate, which: Which) -> list[Move]:
    chosen: list[Move] = []
    trial = _Trial(first, [])
    for move in MOVES:
        while _excess(trial.estimate, which):
            step = replace(move)  # an object of its own, so that one of several equal steps can be taken back
            tried = _after(step, trial, which)
            if _excess(tried.estimate, which) >= _excess(trial.estimate, which):
                break
            chosen.append(step)
            trial = tried
            if not move.repeat:
                break
    return chosen


def _apply(setup: Setup, moves: Sequence[Move], which: Which) -> _Trial:
    trial = _Trial(estimate(setup), [])
    for move in moves:
        trial = _after(move, trial, which)
    return trial


def _after(move: Move, trial: _Trial, which: Which) -> _Trial:
    changed = move.apply(trial.estimate.setup, trial.estimate, which)
    return trial if changed is None else _Trial(estimate(changed[0]), [*trial.changes, *changed[1]])


def _fill_up(trial: _Trial, which: Which, most: float) -> _Trial:
    """Give vLLM what later moves have made free: its cache decides how many rollouts run side by side."""
    setup, load = trial.estimate.setup, getattr(trial.estimate, which)
    lowered = [change for change in trial.changes if change.setting == "vllm_gpu_memory_utilization"]
    if not lowered or load.generation.awake >= load.phases[0].total:
        return trial
    room = trial.estimate.budget - (load.phases[0].total - load.generation.awake)
    share = round(min(most, math.floor(room / setup.gpu_bytes / STEP) * STEP), 2)
    if share <= setup.args.vllm_gpu_memory_utilization:
        return trial
    fuller = estimate(changed(setup, vllm_gpu_memory_utilization=share))
    if _excess(fuller, which):  # without sleep mode the share counts in every phase
        return trial
    return _Trial(fuller, [*trial.changes, replace(lowered[-1], value=share)])


def _last_of_each(changes: Sequence[Change]) -> list[Change]:
    """The last value of every setting, in the order in which settings came up first."""
    last = {change.setting: change for change in changes}
    return [last[name] for name in dict.fromkeys(change.setting for change in changes)]


def _share_work(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    """Settings of :mod:`vt_trl.speed` that are off: on, they change nothing but memory and time."""
    off = [name for name in SHARING if not getattr(setup.args, name)]
    if not off:
        return None
    return changed(setup, **dict.fromkeys(off, True)), [Change(name, True, SHARING[name]) for name in off]


def _sleep(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    args = setup.args
    if not args.use_vllm or args.use_cpu or args.vllm_enable_sleep_mode:
        return None
    change = Change("vllm_enable_sleep_mode", True, "vLLM gives its memory back while the model is trained")
    return changed(setup, vllm_enable_sleep_mode=True), [change]


def _checkpointing(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    if setup.args.gradient_checkpointing:
        return None
    change = Change("gradient_checkpointing", True, "layers keep their input only and are computed again")
    return changed(setup, gradient_checkpointing=True), [change]


def _share(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    """vLLM's share of the GPU: down to what is left beside the rest, up to what one context needs."""
    args, gpu = setup.args, setup.gpu_bytes
    if not args.use_vllm or args.use_cpu or not gpu or before.budget is None:
        return None
    load = getattr(before, which)
    beside = load.phases[0].total - load.generation.awake
    most = math.floor((before.budget - beside) / gpu / STEP) * STEP
    least = math.ceil(load.generation.at_least / gpu / STEP) * STEP
    now = args.vllm_gpu_memory_utilization
    value = round(max(least, min(now, most)), 2)
    if value == now or value > 0.95 or value <= 0:
        return None
    why = "so much is left beside what training holds" if value < now else "weights and one context need as much"
    return changed(setup, vllm_gpu_memory_utilization=value), [Change("vllm_gpu_memory_utilization", value, why)]


def _judge_share(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    args = setup.args
    judge = make_judge(args.judge, args.judge_args) if args.judge == "local" else None
    if not isinstance(judge, LocalJudge) or not before.judge.judging or judge.gpu_memory_utilization <= 0.1:
        return None
    share = round(max(0.1, judge.gpu_memory_utilization - 0.05), 2)
    settings = {**(args.judge_args or {}), "gpu_memory_utilization": share}
    return changed(setup, judge_args=settings), [
        Change("judge_args", settings, "the judge takes less while it judges")
    ]


def _sync(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    args = setup.args
    if setup.launch.sharding != "fsdp2" or args.gradient_accumulation_steps == 1 or syncs_each_batch(args):
        return None
    value = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    accelerator = copy.copy(args.accelerator_config)
    accelerator.gradient_accumulation_kwargs = value["gradient_accumulation_kwargs"]
    change = Change("accelerator_config", value, "FSDP2 keeps whole gradients between micro-batches otherwise")
    return changed(setup, accelerator_config=accelerator), [change]


def _shard(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    launch = setup.launch
    if launch.processes == 1 or launch.weight_shards > 1:
        return None
    change = Change(
        CONFIG, "recipes/accelerate/zero3.yaml", "divides weights, gradients and states over the processes"
    )
    return replace(setup, launch=replace(launch, sharding="zero3")), [change]


def _micro_batch(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    """Fewer samples at a time, as many more times: the same update."""
    args = setup.args
    samples = args.per_device_train_batch_size
    factor = next((n for n in range(2, samples + 1) if samples % n == 0), None)
    if factor is None:
        return None
    smaller = {
        "per_device_train_batch_size": samples // factor,
        "gradient_accumulation_steps": args.gradient_accumulation_steps * factor,
        "steps_per_generation": args.steps_per_generation * factor,
    }
    shown = [name for name in smaller if name != "steps_per_generation" or name in setup.given]
    why = "fewer samples at a time, the same update"
    if setup.packed:
        why += ", yet prompts are computed more often"
    return changed(setup, **smaller), [Change(name, smaller[name], why) for name in shown]


def _packed_tokens(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    """Long micro-batches in several forwards: activations of layers at work shrink, inputs of layers stay."""
    now = setup.args.max_packed_tokens
    if not setup.packed or (now is not None and now <= PACKED):
        return None
    change = Change("max_packed_tokens", PACKED, "micro-batches of unusual length in several forwards")
    return changed(setup, max_packed_tokens=PACKED), [change]


def _generation(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    """Fewer rollouts at a time, in whole groups: their pixels and tokens stay on the GPU until they are trained on."""
    args = setup.args
    steps, samples = args.steps_per_generation, args.per_device_train_batch_size
    whole = args.num_generations // math.gcd(args.num_generations, samples)
    if steps % 2 or (steps // 2) % whole:
        return None
    total = args.generation_batch_size // 2
    why = "fewer rollouts at a time"
    if steps // 2 >= args.gradient_accumulation_steps:
        why += f", so {steps // 2 // args.gradient_accumulation_steps} updates per generation"
    values = {"steps_per_generation": steps // 2, "generation_batch_size": total}
    name = "steps_per_generation" if "steps_per_generation" in setup.given else "generation_batch_size"
    return changed(setup, **values), [Change(name, values[name], why)]


def _turns(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    now = setup.args.max_turn_tokens
    if now // 2 < LEAST_TURN:
        return None
    return changed(setup, max_turn_tokens=now // 2), [Change("max_turn_tokens", now // 2, "shorter turns")]


def _pixels(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    args = setup.args
    if args.environment not in ENVIRONMENTS:
        return None
    rule = ENVIRONMENTS[args.environment](**(args.environment_args or {})).rule
    area = rule.max_pixels // 2
    if area < max(LEAST_PIXELS, rule.min_pixels):
        return None
    settings = {**(args.environment_args or {}), "max_pixels": area}
    change = Change("environment_args", settings, "smaller full views")
    return changed(setup, environment_args=settings), [change]


def _lora(setup: Setup, before: Estimate, which: Which) -> tuple[Setup, list[Change]] | None:
    if setup.run.lora != "none":
        return None
    changes = [Change("lora", "language", "trains an adapter instead of the weights, without a reference")]
    values: dict[str, Any] = {"lora": "language"}
    if not setup.run.train_vision:
        values["train_vision"] = True
        changes.append(Change("train_vision", True, "an adapter leaves the tower alone anyway"))
    if setup.run.dtype == "float32" and setup.args.bf16:
        values["dtype"] = "bfloat16"
        changes.append(Change("dtype", "bfloat16", "frozen weights need no more"))
    return changed(setup, **values), changes


def _smaller_model(after: Estimate, which: Which) -> Change:
    """How much smaller: weights, states, activations and engine shrink with the model; rollouts do not."""
    load = getattr(after, which)
    shares = []
    for phase in load.phases:
        fixed = sum(phase.parts[part] for part in ("rollouts", "judge", "context"))
        engine = load.generation.at_least - load.generation.awake if phase.name == "generation" else 0
        shares.append((after.budget - fixed) / max(1, phase.total + engine - fixed))
    weights = after.setup.counts.base / 1e9
    why = f"this one has {weights:.1f} billion weights, and nothing milder makes it fit"
    return Change("model", f"one with at most {weights * max(0.0, min(shares)):.1f} billion weights", why)


MOVES = (
    Move(_share_work),
    Move(_sleep),
    Move(_sync),
    Move(_share, repeat=True),
    Move(_judge_share, repeat=True),
    Move(_packed_tokens),
    Move(_micro_batch, repeat=True),
    Move(_checkpointing),
    Move(_shard),
    Move(_generation, repeat=True),
    Move(_turns, repeat=True),
    Move(_pixels, repeat=True),
    Move(_lora),
    Move(_share, repeat=True),
    Move(_judge_share, repeat=True),
    Move(_micro_batch, repeat=True),
    Move(_generation, repeat=True),
)
