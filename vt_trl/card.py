"""The model card: what was trained, on what, how well, and how to use it, from the notes of a run.

Dialogues and names come from policies and data sets and are untrusted: a text is printed inside a code fence that is
longer than any in it, a name has its markup escaped, and nothing but Hub names gets into the front matter.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from vt_trl.play import printable
from vt_trl.run_notes import RunNotes

TAGS = ("vt_trl", "trl", "grpo", "visionthink", "vision-language")
_SNIPPETS = {kind: "inference.py.j2" for kind in ("resize", "direct", "single")}  # by the environment's kind
_SNIPPETS |= {kind: "pipeline.py.j2" for kind in ("zoom", "look")}  # too many turns to lead in a few lines
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[\w.-]+")


def render_card(notes: RunNotes, name: str, merged: bool = False, tags: Sequence[str] = ()) -> str:
    """The text of a README.md with front matter.

    Args:
        name: the repository or folder, as the inference snippet is to load it.
        merged: the adapter has been merged into the weights.
        tags: more tags for the front matter.
    """
    environment = _templates()
    adapter = notes.adapter and not merged
    snippet = ""
    if template := _SNIPPETS.get(notes.environment.get("kind")):
        snippet = environment.get_template(template).render(notes=notes, name=name)
    body = environment.get_template("model_card.md.j2").render(
        notes=notes,
        name=name,
        adapter=adapter,
        merged=merged,
        snippet=snippet,
        recipe=yaml.safe_dump(notes.recipe, sort_keys=False, allow_unicode=True) if notes.recipe else "",
        dialogue=dialogue(notes.example) if notes.example else "",
    )
    return f"---\n{front_matter(notes, name, adapter, tags)}\n---\n\n{body}"


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vt_trl"),
        autoescape=False,  # Markdown, not HTML; what is untrusted goes through plain() or fence()
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "fence": fence, "number": _number, "duration": _duration, "code": repr}
    return environment


def front_matter(notes: RunNotes, name: str, adapter: bool, tags: Sequence[str] = ()) -> str:
    """The card's metadata as YAML; local names are left out, the Hub would refuse them."""
    sets = list(dict.fromkeys(entry["name"] for entry in notes.data if _is_hub_name(entry["name"])))
    licence = {key: value for key, value in notes.licence.items() if key != "license" or _LICENCE.fullmatch(value)}
    base = notes.base_model if _is_hub_name(notes.base_model) else None
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        datasets=sets or None,
        model_name=printable(name.rpartition("/")[2]),
        **licence,
    ).to_yaml()


def _is_hub_name(name: str) -> bool:
    return bool(_HUB_NAME.fullmatch(name))


def plain(text: Any) -> str:
    """A name or a short text in one line, with everything escaped that Markdown, tables or HTML could read."""
    line = " ".join(printable(str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>|~&#$!@:])", r"\\\1", line)


def fence(text: str, language: str = "") -> str:
    """A text as a code block it cannot end: the fence is longer than any run of backticks in it."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(longest + 1, 3)
    return f"{marks}{language}\n{text.rstrip(chr(10))}\n{marks}"


def dialogue(example: dict[str, Any]) -> str:
    """An example as one text: roles at the margin, what was said or shown indented, pictures by their size."""
    lines = []
    for message in example["messages"]:
        parts = [
            "\n[picture, {} x {} pixels]\n".format(*part["picture"]) if "picture" in part else part["text"]
            for part in message["parts"]
        ]
        said = "".join(parts).replace("\r\n", "\n").strip("\n")
        lines += [message["role"], textwrap.indent(said, "    "), ""]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
