"""Run the stages of a plan, each in a process of its own, and those alone that are not done with the inputs of now.

A stage is done when it ended well with the same inputs (:mod:`vt_trl.loop.inputs`) and its output is there. One that
was interrupted with the same inputs goes on in its folder; with other inputs its folder is set aside first, so that
nothing is ever mixed.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vt_trl.errors import ConfigError, StageFailed, did_you_mean
from vt_trl.loop.inputs import Hashes, fingerprint, hub_names, inputs_of
from vt_trl.loop.manifest import DONE, FAILED, INTERRUPTED, RUNNING, Manifest, Record, locked, now
from vt_trl.loop.metrics import best_round, metrics_of, progress_of
from vt_trl.loop.plan import Plan, Planned, plan_loop
from vt_trl.loop.process import Stopped, end_all, run_command, signals, tail
from vt_trl.loop.stages import arguments, launcher
from vt_trl.versions import PACKAGES, versions

TERMINATED, BROKEN_OFF = 143, 130  # exit statuses after SIGTERM and SIGINT
_PATIENCE = 30.0  # seconds for what a killed driver left running


def run_loop(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
    again: Sequence[str] = (),
    remove_stale: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Run what is not done of a loop and return its manifest.

    Args:
        recipe, overrides: see :func:`vt_trl.loop.recipe.read_loop`.
        until: name or id of the stage after which to stop.
        again: ids of stages that run again although nothing has changed.
        remove_stale: remove outputs that no longer belong to their stage, instead of setting them aside.

    Raises ConfigError before anything runs, StageFailed when a stage does, and
    :class:`~vt_trl.loop.process.Stopped` after SIGINT or SIGTERM.
    """
    plan = plan_loop(recipe, overrides)
    for name in (*again, *([until] if until else [])):
        ids = [*plan.by_id, *(one.stage.name for one in plan.stages)]
        if name not in ids:
            raise ConfigError(
                f"{name!r} is no stage of this loop.{did_you_mean(name, ids)} Use {', '.join(plan.by_id)}."
            )
    with locked(plan.folder), signals() as noted:
        driver = Driver(plan, console or Console(highlight=False, soft_wrap=True), noted, remove_stale)
        return driver.run(until, {one.id for one in plan.stages if {one.id, one.stage.name} & set(again)})


class Driver:
    """One start of a loop."""

    def __init__(self, plan: Plan, console: Console, noted: list[int], remove_stale: bool = False):
        self.plan, self.console, self.noted, self.remove_stale = plan, console, noted, remove_stale
        self.manifest = Manifest.read(plan.folder)
        self.manifest.recipe = str(plan.recipe.path)
        self.hashes = Hashes(plan.folder)
        self.prints: dict[str, str] = {}  # id -> fingerprint, of the stages that are done now

    def run(self, until: str | None = None, again: Sequence[str] | set[str] = ()) -> Manifest:
        self._end_orphans()
        for one in self.plan.stages:
            self._stage(one, one.id in again)
            if until in (one.id, one.stage.name) and (until == one.id or one == self.plan.of_stage(until)[-1]):
                break
        return self.manifest

    def _end_orphans(self) -> None:
        """A driver that was killed may have left its stage running; two of them in one folder would mix."""
        for name, record in self.manifest.stages.items():
            if record.status == RUNNING:
                ended = end_all(record.token, 0.0) if record.token else 0
                if ended:
                    self._say(name, f"{ended} processes of an earlier start were still running and were ended.")
                record.status = INTERRUPTED
                self.manifest.write()

    def _stage(self, one: Planned, again: bool) -> None:
        if self.noted:
            raise Stopped(self.noted[0])
        best = self.best_number() if one.waits_for_best else None
        inputs = inputs_of(one, self.plan, self.hashes, best, self.prints)
        print_, record = fingerprint(inputs), self.manifest.stages.get(one.id)
        self.prints[one.id] = print_
        if record and record.status == DONE and record.fingerprint == print_ and not again and _is_there(one.out):
            self._note_edit(one, record)
            return
        if one.out.exists():
            self._clear(one, record, print_, again)
        if record is None or record.fingerprint != print_ or record.status == DONE:
            record = Record(INTERRUPTED, one.stage.run, str(one.out.relative_to(self.plan.folder)), print_)
        record.inputs, record.round = inputs, one.round
        record.seed = one.raw.get("seed") if isinstance(one.raw.get("seed"), int) else None
        self.manifest.stages[one.id] = record
        self._run(one, record, best)

    def _clear(self, one: Planned, record: Record | None, print_: str, again: bool) -> None:
        """Make room for a stage that cannot go on with what lies in its folder."""
        goes_on = one.kind.goes_on or one.stage.resumes
        same = record is not None and record.fingerprint == print_ and record.status != DONE
        if same and not again:
            if not goes_on:
                shutil.rmtree(one.out)  # half of what the very same stage will make again
            return
        why = "asked to run again" if again else "its inputs changed" if record else "not in the manifest"
        to = self.manifest.set_aside(one.out, one.id, why, self.remove_stale)
        self._say(one.id, f"{why}: its earlier output is {f'in {to}' if to else 'removed'}.")

    def _run(self, one: Planned, record: Record, best: int | None) -> None:
        command = self._command(one, best)
        record.command, record.log = command, f"logs/{one.id}.log"
        record.status, record.token, record.exit = RUNNING, uuid.uuid4().hex, None
        record.versions = versions((*PACKAGES, "accelerate", "datasets"))
        record.hub = hub_names(one, best)
        record.starts, record.started, record.ended = record.starts + 1, now(), ""
        self.manifest.write()
        self.hashes.save()
        log = self.plan.folder / record.log
        goes_on = f", start {record.starts}, going on with what is there" if one.out.exists() else ""
        self._say(one.id, f"{one.stage.run}: {log}{goes_on}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"--- {record.started} start {record.starts}: {shlex.join(record.command)}\n")
        began, stopped, status = time.monotonic(), None, None
        try:
            status = run_command(
                command,
                log,
                one.stage.env,
                record.token,
                say=lambda text: self._say(one.id, text),
                progress=lambda: progress_of(one),
                noted=self.noted,
            )
        except Stopped as signalled:
            stopped = signalled
        except OSError as error:
            raise ConfigError(f"{one.id}: {command[0]} cannot be started: {error}.") from error
        record.seconds = round(record.seconds + time.monotonic() - began, 1)
        record.ended, record.exit = now(), status
        if stopped is None and status == TERMINATED:  # somebody else asked it to end, and it did, in order
            stopped = Stopped(signal.SIGTERM)
        if stopped is not None:
            record.status = INTERRUPTED
            self.manifest.write()
            raise stopped
        self._finish(one, record, status)

    def _finish(self, one: Planned, record: Record, status: int) -> None:
        problem = f"it ended with exit status {status}" if status else None
        if problem is None and not _is_there(one.out):
            problem = f"it ended well, but left nothing in {one.out}"
        if problem is None:
            try:
                record.metrics = metrics_of(one)
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            record.status = FAILED
            self.manifest.write()
            raise StageFailed(failure(one, record, self.plan, problem))
        record.status, record.output = DONE, self.hashes.of(one.out)
        record.hub = hub_names(one, self.best_number() if one.waits_for_best else None)
        self._name_best()
        self.hashes.save()
        self.manifest.write()
        self._say(one.id, f"done in {record.seconds:.0f} s" + short_metrics(record.metrics))

    def _command(self, one: Planned, best: int | None) -> list[str]:
        """The command line of a stage; a trainer's settings are written into a recipe of its own."""
        settings = one.settings(best)
        where = f"{self.plan.recipe.path}: stage {one.id!r}"
        words = [*launcher(one.launched(), where), "-m", *one.kind.command()]
        if not one.kind.trains:
            one.out.parent.mkdir(parents=True, exist_ok=True)
            return [*words, *arguments(one.kind.parser(), settings, where)]
        path = self.plan.folder / "settings" / f"{one.id}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = f"# Stage {one.id} of {self.plan.recipe.path}, written by `vt-trl loop`.\n"
        path.write_text(head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return [*words, str(path)]

    def best_number(self) -> int | None:
        """The best round of those that are evaluated. Raises ConfigError when it is needed and none is."""
        self._name_best()
        if self.manifest.best is None and self.plan.recipe.best is not None:
            raise ConfigError(
                f"No round has a figure {self.plan.recipe.best.metric!r} of the stage "
                f"{self.plan.recipe.best.stage!r}, so none is the best; look at best in {self.plan.recipe.path}."
            )
        return self.manifest.best["round"] if self.manifest.best else None

    def _name_best(self) -> None:
        best = self.plan.recipe.best
        if best is None:
            return
        of = {one.round: one for one in self.plan.of_stage(best.of)}
        done = {
            one.round: self.manifest.stages[one.id].metrics
            for one in self.plan.of_stage(best.stage)
            if one.round in of and one.id in self.prints and self._is_done(one.id)
        }
        found = best_round(best.metric, best.lower, done)
        if found is None:
            self.manifest.best = None
            return
        number, value = found
        place = of[number]
        self.manifest.best = {"round": number, "stage": place.id, "out": str(place.out.relative_to(self.plan.folder))}
        self.manifest.best |= {"by": best.stage, "metric": best.metric, "value": value, "of_rounds": sorted(done)}

    def _is_done(self, name: str) -> bool:
        record = self.manifest.stages.get(name)
        return record is not None and record.status == DONE and record.fingerprint == self.prints.get(name)

    def _note_edit(self, one: Planned, record: Record) -> None:
        if self.hashes.of(one.out) != record.output:
            self._say(one.id, "its output was changed since; it is taken as it is, and what uses it runs again.")
        else:
            self._say(one.id, "done, unchanged")

    def _say(self, name: str, text: str) -> None:
        self.console.print(f"[{name}] {text}", markup=False, highlight=False)


def failure(one: Planned, record: Record, plan: Plan, problem: str) -> str:
    """What to say of a stage that failed: why, the end of its log, and what can be done."""
    log = plan.folder / record.log
    done = [name for name in plan.by_id if name != one.id and _done_before(name, one.id, plan)]
    kept = f"Kept and not run again: {', '.join(done)}." if done else "No stage was done before it."
    last = "\n".join(f"    {text}" for text in tail(log))
    return (
        f"stage {one.id} ({one.stage.run}) failed: {problem}. The end of its log, {log}:\n{last}\n"
        f"{kept} To look at it alone: {shlex.join(record.command)}\n"
        f"To go on when it is mended: the same command again, which starts with this stage where it was; "
        f"`--again {one.id}` starts it from nothing."
    )


def _done_before(name: str, failed: str, plan: Plan) -> bool:
    order = list(plan.by_id)
    return order.index(name) < order.index(failed)


def short_metrics(metrics: dict[str, Any], most: int = 4) -> str:
    """The first figures without a part of a name, as the end of a sentence."""
    shown = [f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name][:most]
    return f": {', '.join(shown)}" if shown else ""


def _is_there(out: Path) -> bool:
    return out.is_file() or (out.is_dir() and any(out.iterdir()))
