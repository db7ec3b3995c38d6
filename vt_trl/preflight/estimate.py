"""The estimate itself: a setup in, bytes per phase and rank out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vt_trl.preflight.engines import GIB, Generation, JudgeMemory, generation, judge_memory
from vt_trl.preflight.episodes import Episode
from vt_trl.preflight.micro import Load as Kind
from vt_trl.preflight.micro import work
from vt_trl.preflight.setup import Setup
from vt_trl.preflight.states import Rollouts, rollouts
from vt_trl.preflight.step import StepMemory, training_step
from vt_trl.preflight.timing import Seconds, step_seconds

CONTEXT = GIB  # assumed: CUDA context, cuBLAS and NCCL buffers of the training process
MARGIN = 0.05  # of the GPU, for memory that the allocator holds and cannot use

PARTS = (
    *("weights", "reference", "gradients", "optimizer", "rollouts"),
    *("activations", "gathered", "engine", "judge", "context"),
)


@dataclass(frozen=True)
class Phase:
    """One phase of a step: bytes per part of :data:`PARTS`, at the moment that needs most."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Load:
    """Memory of one rank for one kind of rollouts. ``rollouts``: tensors of one generation."""

    episode: Episode
    phases: tuple[Phase, ...]
    rollouts: Rollouts
    generation: Generation
    step: StepMemory

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one optimizer step on one rank, for the assumed workload; times ``processes`` for the whole job.

    ``computed``: positions that the language model computes, a shared prompt once and padding where there is some;
    ``updates``: optimizer steps one generation serves.
    """

    visual: float
    text: float
    sampled: float
    computed: float
    rollouts: int
    updates: float

    @property
    def total(self) -> float:
        return self.visual + self.text + self.sampled


@dataclass(frozen=True)
class Estimate:
    """What a run needs, per rank. ``longest``: every rollout as long and every picture as large as the settings
    allow; ``typical``: the assumed workload."""

    setup: Setup
    longest: Load
    typical: Load
    tokens: Tokens
    seconds: Seconds
    judge: JudgeMemory

    @property
    def budget(self) -> int | None:
        """Bytes that may be used, or None when no GPU is known."""
        return None if self.setup.gpu_bytes is None else round(self.setup.gpu_bytes * (1 - MARGIN))

    def excess(self, load: Load) -> int:
        """Bytes by which the phases exceed the budget, summed, and what the engine lacks for one context. 0: it fits,
        or no GPU is known."""
        if self.budget is None:
            return 0
        over = sum(max(0, phase.total - self.budget) for phase in load.phases)
        engine = load.generation
        vllm = self.setup.args.use_vllm and not self.setup.args.use_cpu
        return over + (max(0, engine.at_least - engine.awake) if vllm else 0)

    @property
    def fits(self) -> bool | None:
        """Whether even the longest rollouts fit; None when no GPU is known."""
        return None if self.budget is None else self.excess(self.longest) == 0

    @property
    def fits_typically(self) -> bool | None:
        return None if self.budget is None else self.excess(self.typical) == 0


def estimate(setup: Setup) -> Estimate:
    """Bytes per rank and phase, tokens and seconds per optimizer step. Arithmetic only: no weights are made."""
    judge = judge_memory(setup.args, setup.gpu_bytes, setup.judge_config)
    typical = _load(setup, judge, "typical", setup.padded, setup.mean("patches"), setup.routes[-1][1])
    return Estimate(
        setup=setup,
        longest=_load(setup, judge, "longest", setup.longest, setup.longest.patches, setup.longest),
        typical=typical,
        tokens=_tokens(setup),
        seconds=step_seconds(setup, typical.generation.cache),
        judge=judge,
    )


def _load(
    setup: Setup, judge: JudgeMemory, kind: Kind, episode: Episode, mean_patches: float, generated: Episode
) -> Load:
    """``episode``: what the batch's tensors are padded to; ``generated``: as long as one is in the engine."""

    def memory(training: bool) -> StepMemory:
        done, how = work(setup, kind, training), (setup.precision, setup.training, not setup.args.use_cpu)
        return training_step(setup.widths, setup.counts, done.whole, *how, part=done.part)

    step = replace(memory(True), passes=memory(False).passes)
    batch = rollouts(setup, episode, mean_patches)
    engine = generation(setup, generated)
    return Load(episode, _phases(setup, step, batch, engine, judge), batch, engine, step)


def _phases(
    setup: Setup, step: StepMemory, batch: Rollouts, engine: Generation, judge: JudgeMemory
) -> tuple[Phase, ...]:
    """The phases of one generation and its updates.

    The rollouts of the last generation stay in the trainer's buffer until those of the next replace them, and
    splitting these into micro-batches copies their tokens once more, but no pixels. Features of frozen towers are let
    go before the next generation.
    """
    held = setup.states
    always = {
        "weights": held.weights,
        "reference": held.reference,
        "optimizer": held.optimizer,
        "judge": judge.always,
        "context": 0 if setup.args.use_cpu else CONTEXT,
    }
    updating = held.gradients + held.buckets
    between = updating + held.unsharded if held.gradients_stay else held.buckets

    def phase(name: str, **parts: int) -> Phase:
        return Phase(name, {part: always.get(part, 0) + parts.get(part, 0) for part in PARTS})

    scoring = {"gradients": between, "engine": engine.asleep}
    scored = 2 * batch.total + batch.features
    training = {"gradients": updating, "engine": engine.asleep, "rollouts": batch.total + batch.features}
    phases = [
        phase("generation", gradients=between, rollouts=batch.total, engine=engine.awake, gathered=held.weight_sync),
        phase(
            "log-probabilities",
            rollouts=scored,
            gathered=max(held.gathered, held.gathered_reference),
            activations=step.passes,
            **scoring,
        ),
        phase("judging", rollouts=scored, judge=judge.judging, **scoring),
        phase("splitting", rollouts=scored + batch.tokens, **scoring),
        phase(
            "update",
            gathered=held.gathered,
            activations=max(step.forward, step.backward),
            **training | {"gradients": updating + held.unsharded},
        ),
        phase("optimizer step", optimizer=held.optimizer_step, **training),
    ]
    return tuple(phase for phase in phases if judge.judging or phase.name != "judging")


def _tokens(setup: Setup) -> Tokens:
    count = setup.args.per_device_train_batch_size * setup.args.gradient_accumulation_steps
    return Tokens(
        visual=count * setup.mean("visual"),
        text=count * (setup.mean("prompt_text") + setup.mean("reply_text")),
        sampled=count * setup.mean("sampled"),
        computed=setup.args.gradient_accumulation_steps * work(setup, "mean").whole.tokens,
        rollouts=count,
        updates=setup.updates,
    )
