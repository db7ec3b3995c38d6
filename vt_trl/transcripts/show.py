"""How an episode looks: one component for reports, ``vt-trl view``, evaluation, serving and demos.

What a policy, a judge or a data set wrote is untrusted: templates escape all of it. Needs ``vt-trl[report]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from vt_trl.images import data_uri
from vt_trl.transcripts.record import Transcript

try:
    import jinja2
    from markupsafe import Markup
except ImportError as error:
    raise ImportError(f"{error}. A page needs more packages: pip install 'vt-trl[report]'.") from error

NOTHING = "–"  # stands where a number is missing
_PICTURE_SIDE = 240  # small pictures are enlarged towards this, in CSS pixels
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}

PictureSource = Callable[[Transcript, int], str]


def picture_kind(data: bytes) -> str:
    """``png`` or ``jpeg``, by the first bytes; empty for anything else, which is not shown."""
    return next((kind for start, kind in _KINDS.items() if data.startswith(start)), "")


def inline(transcript: Transcript, index: int) -> str:
    """The address of a picture in a page that must open anywhere; empty when there is none that can be shown."""
    data = transcript.images[index] if 0 <= index < len(transcript.images) else b""
    return data_uri(kind, data) if (kind := picture_kind(data)) else ""


def share(value: Any) -> str:
    return f"{100 * value:.1f} %" if is_number(value) else NOTHING


def number(value: Any, digits: int = 1, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if is_number(value) else NOTHING


def percent(value: Any) -> str:
    """A share as SVG writes it."""
    return f"{100 * value:.4g}%" if is_number(value) else "0%"


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def environment() -> jinja2.Environment:
    """Templates that escape everything printed, with the macros of ``transcript.html.j2`` at hand."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("vt_trl"), autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True
    )
    made.filters |= {"share": share, "number": number, "percent": percent}
    made.globals |= {"picture_scale": picture_scale, "inline": inline}
    return made


def picture_scale(transcript: Transcript) -> int:
    """One factor for all pictures of an episode, so that a low view looks as small as it is; 1 for large ones."""
    sides = [side for turn in transcript.turns for one in turn.pictures for side in (one.width, one.height)]
    return min(max(_PICTURE_SIDE // max(sides, default=1), 1), 8)


def render_transcript(transcript: Transcript, source: PictureSource = inline, label: str = "") -> Markup:
    """One episode as HTML: dialogue, pictures, answer, verdict and rewards. For pages with ``transcript.css``.

    ``source`` gives the address of a picture (default: the picture itself, as a ``data:`` URI); ``label`` is printed
    with it, such as "after training".
    """
    macros = environment().get_template("transcript.html.j2").module
    return Markup(macros.transcript(transcript, source, label))


def page_css(within: str = "") -> Markup:
    """The style of every page, light and dark, for a ``<style>`` element.

    ``within``: a selector, such as ``.episodes``. The style is then that of such elements alone (nested CSS), which is
    what an episode in a page of somebody else's needs. A selector is code: take none from data.
    """
    source, _, _ = environment().loader.get_source(environment(), "transcript.css")
    if not within:
        return Markup(source)
    return Markup(f"{within} {{ color: var(--ink); {source.replace(':root', '&')} }}")


def embed_transcript(transcript: Transcript) -> Markup:
    """One episode that brings its style along, for a notebook or a page of somebody else's."""
    html = Markup('<div class="episodes"><style>{}</style>{}</div>')
    return html.format(page_css(".episodes"), render_transcript(transcript))
