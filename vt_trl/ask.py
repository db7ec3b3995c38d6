"""One question on the terminal: what the policy saw, what it wrote in each turn, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from vt_trl.errors import ConfigError
from vt_trl.pipeline import PipelineResult, PipelineTurn, VisionThinkPipeline
from vt_trl.play import printable


def ask(
    image: Any,
    question: str,
    model: str | Path,
    folder: str | Path | None = None,
    console: Console | None = None,
    **settings: Any,
) -> PipelineResult:
    """Ask, print the turns as they end, and return the result.

    ``image``: one, or a list where the environment takes several. ``folder``: the pictures the model saw are saved
    there as PNG. ``settings``: of the pipeline. Raises ConfigError and DataError for a model or a picture that cannot
    be used.
    """
    console = console or Console()
    if folder is not None:
        _prepare(Path(folder))
    pipe = VisionThinkPipeline(model, **settings)
    result = None
    for turn in pipe(image=image, question=question, stream=True):
        console.print(_panel(turn))
        if turn.pictures:
            console.print(Text(f"shown: {_sizes(turn.pictures)}", style="dim"))
        result = turn.result or result
    console.print(Text(_summary(result)))
    if folder is not None:
        for number, picture in enumerate(result.pictures, start=1):
            path = Path(folder) / f"picture-{number}.png"
            picture.save(path)
            console.print(Text(f"picture {number}: {_sizes([picture])}, {path}"), soft_wrap=True)
    return result


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--save-pictures is {folder}: {error.strerror}; name a folder that can be made.") from error


def _panel(turn: PipelineTurn) -> Panel:
    """A turn; its text is untrusted, so neither markup nor control characters in it do anything."""
    does = "calls the tool" if turn.called else "no answer" if turn.answer is None else "answers"
    faults = f", {', '.join(turn.faults)}" if turn.faults else ""
    title = f"turn {turn.turn + 1}: {does} ({turn.generated_tokens} tokens{faults})"
    return Panel(Text(printable(turn.text)), title=title, title_align="left")


def _sizes(pictures: Sequence[Image.Image]) -> str:
    return ", ".join(f"{one.width} x {one.height} px" for one in pictures)


def _summary(result: PipelineResult) -> str:
    answer = f"none ({result.status})" if result.answer is None else printable(result.answer)
    return (
        f"answer: {answer}\n{'looked again' if result.asked else 'did not look again'}; "
        f"{result.visual_tokens} visual tokens, {result.prompt_tokens} in the prompt, {result.generated_tokens} "
        f"generated; saw {_sizes(result.pictures)}"
    )
