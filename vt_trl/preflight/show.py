"""The preflight as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vt_trl.preflight.advice import CONFIG, Advice
from vt_trl.preflight.engines import GIB
from vt_trl.preflight.estimate import MARGIN, PARTS, Estimate, Load

if TYPE_CHECKING:
    from vt_trl.preflight import Preflight


def show(preflight: Preflight, console: Console) -> None:
    """Print everything: memory per phase, tokens, seconds, verdict and advice."""
    estimate = preflight.estimate
    for line in heading(estimate):
        console.print(line, highlight=False)
    console.print(memory_table(estimate.typical, f"Typical rollouts (assumed: {assumed(estimate)})"))
    longest = estimate.longest.episode
    title = f"Longest rollouts the settings allow ({longest.tokens:,} tokens, {longest.visual:,} of them visual)"
    console.print(memory_table(estimate.longest, title))
    console.print(token_table(estimate))
    for line in (*engine_lines(estimate), *time_lines(estimate), *preflight.notes, *verdict(preflight)):
        console.print(line, highlight=False)


def assumed(estimate: Estimate) -> str:
    """The workload in words."""
    workload = estimate.setup.workload
    words = [
        "pictures of {} x {}".format(*workload.picture),
        f"{workload.turn_tokens} sampled tokens per turn",
        f"{workload.tail:g} times as many in the longest",
    ]
    if len(estimate.setup.routes) > 1:
        words.append(f"{workload.asks:.0%} ask")
    return ", ".join(words)


def heading(estimate: Estimate) -> list[str]:
    setup, counts = estimate.setup, estimate.setup.counts
    trained = f"{counts.trained / 1e6:,.0f} million trained"
    gpu = "no GPU known" if setup.gpu_bytes is None else f"GPU of {gib(setup.gpu_bytes)} GiB"
    if setup.args.use_cpu:
        gpu = "CPU"
    return [
        f"[bold]{setup.run.model}[/bold]: {counts.base / 1e6:,.0f} million weights (language "
        f"{counts.language / 1e6:,.0f}, vision {counts.vision / 1e6:,.0f}, embeddings {counts.embedding / 1e6:,.0f}), "
        f"{trained}",
        f"{setup.launch}; {gpu}. Estimates, GiB per rank; nothing here is measured.",
    ]


def memory_table(load: Load, title: str) -> Table:
    """GiB per phase and part; parts that no phase has are left out."""
    table = Table(title=title, title_justify="left", title_style="bold")
    parts = [part for part in PARTS if any(phase.parts[part] for phase in load.phases)]
    table.add_column("phase")
    for part in parts:
        table.add_column(part, justify="right")
    table.add_column("total", justify="right", style="bold")
    for phase in load.phases:
        peak = phase is load.peak
        cells = [gib(phase.parts[part]) if phase.parts[part] else "" for part in parts]
        table.add_row(phase.name + (" *" if peak else ""), *cells, gib(phase.total), style="yellow" if peak else None)
    return table


def token_table(estimate: Estimate) -> Table:
    tokens, processes = estimate.tokens, estimate.setup.launch.processes
    table = Table(title="Tokens per optimizer step, typical rollouts", title_justify="left", title_style="bold")
    for name in ("", "rollouts", "visual", "text", "sampled", "all", "computed"):
        table.add_column(name, justify="right" if name else "left")
    numbers = (tokens.rollouts, tokens.visual, tokens.text, tokens.sampled, tokens.total, tokens.computed)
    for label, factor in (("per rank", 1), ("all ranks", processes)):
        table.add_row(label, *(f"{factor * number:,.0f}" for number in numbers))
    return table


def engine_lines(estimate: Estimate) -> list[str]:
    args, engine = estimate.setup.args, estimate.longest.generation
    if not args.use_vllm or (estimate.setup.gpu_bytes is None and not args.use_cpu):
        return []
    typical = estimate.typical.generation
    return [
        f"vLLM: {gib(engine.weights)} GiB of weights and a cache of {engine.cache:,} tokens: "
        f"{typical.cache / max(1, typical.context):.0f} typical contexts, "
        f"{engine.cache / max(1, engine.context):.1f} of the longest ({engine.context:,} tokens)."
    ]


def time_lines(estimate: Estimate) -> list[str]:
    if estimate.setup.args.use_cpu:
        return []
    seconds, machine = estimate.seconds, estimate.setup.machine
    shared = f", one generation for {estimate.tokens.updates:g} steps" if estimate.tokens.updates > 1 else ""
    return [
        f"Seconds per optimizer step on paper: {seconds.total:.0f} (generation {seconds.generation:.0f}, passes "
        f"{seconds.passes:.0f}, update {seconds.update:.0f}){shared}. Assumed, not measured: {machine}."
    ]


def verdict(preflight: Preflight) -> list[str]:
    """Whether it fits, and what to change."""
    estimate = preflight.estimate
    if estimate.budget is None:
        return ["Without a GPU, add --gpu-gib N (24, 40, 80, ...) to see whether it fits and what to change."]
    budget = f"{gib(estimate.budget)} GiB ({MARGIN:.0%} of the GPU are left to the allocator)"
    lines = [_judgement(estimate, budget)]
    for advice in (preflight.needed, preflight.safe):
        if advice is not None:
            lines += advice_lines(advice)
    return lines


def _judgement(estimate: Estimate, budget: str) -> str:
    if estimate.fits:
        return f"[green]Fits[/green] into {budget}: {peaks(estimate)}."
    if estimate.fits_typically:
        return f"[yellow]Fits typical rollouts, not the longest[/yellow], into {budget}: {peaks(estimate)}."
    return f"[red]Does not fit[/red] into {budget}: {peaks(estimate)}."


def peaks(estimate: Estimate) -> str:
    """The largest phase for typical and for the longest rollouts, in GiB."""
    typical, longest = estimate.typical.peak, estimate.longest.peak
    return f"typical {gib(typical.total)} ({typical.name}), longest {gib(longest.total)} ({longest.name})"


def advice_lines(advice: Advice) -> list[str]:
    aim = {"typical": "To fit typical rollouts", "longest": "To fit even the longest rollouts"}[advice.which]
    peak = getattr(advice.after, advice.which).peak
    lines = [f"{aim}, change:"] + [f"  {change}" for change in advice.changes]
    words = " ".join(_quoted(word) for word in advice.overrides())
    if words:
        lines.append(f"  on the command line: {words}")
    if advice.enough:
        lines.append(f"  It then needs {gib(peak.total)} GiB ({peak.name}).")
    elif any(change.setting == CONFIG for change in advice.changes):
        lines.append("  More processes would divide it further.")
    return lines


def _quoted(word: str) -> str:
    return f"'{word}'" if any(mark in word for mark in ' {}"') else word


def gib(number: float) -> str:
    """Bytes in GiB: one decimal, two below 1."""
    value = number / GIB
    return f"{value:.2f}" if 0 < value < 0.995 else f"{value:,.1f}"
