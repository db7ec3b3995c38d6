"""What ``vt-trl`` can do: one entry per command, each with a module that is imported when the command runs.

A module has ``parser()``, an argparse parser without slow imports, and ``run(options, overrides)``, which returns the
exit status or None. ``overrides`` are arguments the parser does not know; they are refused unless there is an option
called ``recipe``, whose lines they override. Errors of :mod:`vt_trl.errors` become messages in :mod:`vt_trl.cli`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What a command is for, in one line, and the module that runs it."""

    help: str
    module: str


COMMANDS: dict[str, Command] = {
    "train": Command("train a recipe; `--key value` overrides a line of it", "vt_trl.commands.train"),
    "sft": Command("fine-tune on traces, before a policy is trained", "vt_trl.commands.sft"),
    "loop": Command("stages in a row, round after round: traces, sft, training, evaluation", "vt_trl.commands.loop"),
    "play": Command("answer as the policy, and see status and reward", "vt_trl.commands.play"),
    "preflight": Command(
        "will it fit? memory, tokens and seconds of a recipe, without a GPU", "vt_trl.commands.preflight"
    ),
    "prepare": Command("make rows: import, check, filter and more", "vt_trl.commands.prepare"),
    "evaluate": Command("models x data x policies: accuracy, requests, tokens", "vt_trl.commands.evaluate"),
    "compare": Command("paired differences of two evaluations", "vt_trl.commands.compare"),
    "ask": Command("one picture, one question, and the turns to the answer", "vt_trl.commands.ask"),
    "serve": Command("an OpenAI-compatible endpoint that plays both turns", "vt_trl.commands.serve"),
    "export": Command("a run or a checkpoint as a folder for the Hub, and push it", "vt_trl.commands.export"),
    "view": Command("look at the rollouts of a run in a browser", "vt_trl.commands.view"),
    "judge-agreement": Command("compare judges on labelled rows", "vt_trl.commands.judge_agreement"),
}
