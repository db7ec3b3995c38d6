"""A page for a trained policy: give it a picture and a question, and watch how closely it looks.

    VT_MODEL=runs/demo/grpo python demos/space/app.py

All settings are environment variables (README.md, next to this file). What a user sends, and what the policy writes,
is untrusted: sizes are limited before anything is decoded, and every text is escaped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import spaces  # ZeroGPU; it has to come before torch
except ImportError:
    spaces = None

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr  # noqa: E402

from vt_trl.commands.options import json_option  # noqa: E402
from vt_trl.data import episode_row, load_rows  # noqa: E402
from vt_trl.errors import ConfigError, DataError  # noqa: E402
from vt_trl.images import load_image  # noqa: E402
from vt_trl.pipeline import VisionThinkPipeline  # noqa: E402
from vt_trl.serving.limits import ServeLimits  # noqa: E402
from vt_trl.transcripts import PictureEncoder, Transcript  # noqa: E402
from vt_trl.transcripts.show import environment, page_css, render_transcript  # noqa: E402
from vt_trl.types import Rollout  # noqa: E402

HERE = Path(__file__).resolve().parent
KEPT_SECONDS = 3600  # uploaded pictures are deleted after that
CSS = """
#shown .html-container { padding: 0; min-height: 4rem; }
.episodes .spent { padding: 1rem 1.15rem; margin: 0 0 1rem; }
.spent .answer { font-size: 1.25rem; font-weight: 600; margin: 0 0 .75rem; overflow-wrap: anywhere; max-width: none;
  unicode-bidi: isolate; }
.spent .bar { display: grid; grid-template-columns: 6.5rem 1fr max-content; gap: .75rem; align-items: center;
  margin: .3rem 0; }
.spent .bar i { display: block; height: .8rem; border-radius: .2rem; background: var(--soft); min-width: 2px; }
.spent .bar .own { background: var(--link); }
.spent .bar b { text-align: right; font-variant-numeric: tabular-nums; }
"""
SHOWN = """
<div class="episodes">
<article class="spent" aria-live="polite">
<p class="answer">{{ headline }}</p>
{% if full %}
{% set most = [used, full] | max %}
<div class="bar"><span>This answer</span><i class="own" style="width: {{ 100 * used / most }}%"></i>
<b>{{ used }}</b></div>
<div class="bar"><span>Always full</span><i style="width: {{ 100 * full / most }}%"></i>
<b>{{ full }}</b></div>
<p>Visual tokens: {{ compared(used, full) }}.</p>
{% else %}<p>Visual tokens: {{ used }}.</p>
{% endif %}
{% if totals.questions > 1 %}
<p class="quiet">Your {{ totals.questions }} questions: {{ totals.used }} of {{ totals.full }},
{{ compared(totals.used, totals.full) }}.</p>
{% endif %}
</article>
{{ episode }}
</div>
"""


@dataclass(frozen=True)
class Settings:
    """What the page is started with; see :meth:`read` for the variables."""

    model: str
    pipeline: dict[str, Any] = field(default_factory=dict)
    limits: ServeLimits = field(default_factory=ServeLimits)
    examples: str = ""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Settings:
        """From environment variables. Raises ConfigError for one that is missing or cannot work."""

        def whole(name: str, default: int | None) -> int | None:
            text = variables.get(name, "").strip()
            if text and not (text.isdecimal() and int(text)):
                raise ConfigError(f"{name} is {text!r}; it must be a whole number above 0.")
            return int(text) if text else default

        model = variables.get("VT_MODEL", "").strip()
        if not model:
            raise ConfigError(
                "VT_MODEL is not set; set it to a folder with a trained model or to its name on the Hub. `make demo` "
                "writes one to runs/demo/grpo."
            )
        pipeline = {name: variables.get(f"VT_{name.upper()}") for name in ("device", "dtype", "policy")}
        pipeline["max_turn_tokens"] = whole("VT_MAX_TURN_TOKENS", None)
        pipeline["environment_args"] = json_option(variables.get("VT_ENVIRONMENT_ARGS", "{}"), "VT_ENVIRONMENT_ARGS")
        limits = ServeLimits(
            image_bytes=whole("VT_MAX_UPLOAD_BYTES", 20 * 2**20),
            image_pixels=whole("VT_MAX_IMAGE_PIXELS", 25_000_000),
            question_chars=whole("VT_MAX_QUESTION_CHARS", 2000),
            requests=whole("VT_MAX_WAITING", 20),
        )
        examples = variables.get("VT_EXAMPLES", str(HERE / "examples"))
        return cls(model, {name: value for name, value in pipeline.items() if value}, limits, examples)


@dataclass(frozen=True)
class Totals:
    """Visual tokens of the questions of one visitor."""

    questions: int = 0
    used: int = 0
    full: int = 0

    def with_one(self, used: int, full: int | None) -> Totals:
        return self if full is None else Totals(self.questions + 1, self.used + used, self.full + full)


def compared(used: int, full: int) -> str:
    """What was saved against always-full, in words; looking twice costs more than looking closely at once."""
    share = 100 * (full - used) / full
    return f"{share:.1f} % saved against always-full" if share >= 0 else f"{-share:.1f} % more than always-full"


class Space:
    """One model behind the page. Episodes are played one at a time: gradio's queue sees to that."""

    def __init__(self, settings: Settings):
        self.limits = settings.limits
        self.pipe = VisionThinkPipeline(settings.model, **settings.pipeline)
        self._shown = environment().from_string(SHOWN)

    def ask(
        self, picture: str | None, question: str | None, totals: Totals
    ) -> Iterator[tuple[str, dict[str, Any], Totals]]:
        """What is shown (HTML), the same as data, and the new totals: at the start, and after each turn."""
        try:
            image = self._checked(picture, question)
            full = self.pipe.tokens_in_full(image)
            encoder = PictureEncoder()
            with closing(self.pipe.watch(image=image, question=question)) as rollouts:
                for rollout in rollouts:
                    if rollout.status is not None:
                        totals = totals.with_one(rollout.visual_tokens, full)
                    shown = self._shown.render(
                        headline=headline(rollout),
                        used=rollout.visual_tokens,
                        full=full,
                        compared=compared,
                        totals=totals,
                        episode=render_transcript(Transcript.of(rollout, encoder=encoder)),
                    )
                    yield shown, facts(rollout, full), totals
        except DataError as error:
            raise refusal(error.reason) from error

    def _checked(self, picture: str | None, question: str | None) -> Any:
        """The picture as RGB. Raises DataError for what is missing or above the limits."""
        if not picture:
            raise DataError("there is no picture; drop one into the field first")
        if not (question or "").strip():
            raise DataError("there is no question; write one first")
        if len(question) > self.limits.question_chars:
            raise DataError(f"the question has {len(question)} characters; {self.limits.question_chars} are allowed")
        if Path(picture).stat().st_size > self.limits.image_bytes:
            raise DataError(f"the picture's file has more than {self.limits.image_bytes} bytes; shrink it")
        return load_image(picture, max_decoded_pixels=self.limits.image_pixels)


def refusal(reason: str) -> gr.Error:
    """What a user is told: a message in the corner, which gradio prints as HTML. So nothing of it may be a tag."""
    text = reason[:1].upper() + reason[1:] + "."
    return gr.Error(text.replace("<", "‹").replace("&", "+"), title="Not answered", print_exception=False)


def headline(rollout: Rollout) -> str:
    if rollout.status is None:
        return "It looks again …" if rollout.asked else "It looks …"
    if rollout.answer is None:
        return f"No answer ({rollout.status.value.replace('_', ' ')})"
    return f"Answer: {rollout.answer}"


def facts(rollout: Rollout, full: int | None) -> dict[str, Any]:
    """The same as numbers and texts, for programs."""
    return {
        "answer": rollout.answer,
        "status": None if rollout.status is None else rollout.status.value,
        "asked": rollout.asked,
        "visual_tokens": rollout.visual_tokens,
        "visual_tokens_always_full": full,
        "turns": [{"text": turn.text, "token_ids": list(turn.token_ids)} for turn in rollout.turns],
    }


def upload_field() -> gr.Image:
    """A field for pictures that hands over the path of the file as it came; :func:`load_image` alone reads it."""
    picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=280, buttons=[])
    keep = picture.async_move_resource_to_block_cache

    async def local_only(path: str | Path | None) -> str | None:
        if path is not None and "://" in str(path):
            raise refusal("addresses are not fetched; send the picture itself")
        return await keep(path)

    picture.async_move_resource_to_block_cache = local_only
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def make_page(settings: Settings) -> gr.Blocks:
    """The page of a model, which is loaded here. Raises ConfigError for settings or a model that cannot be used."""
    space = Space(settings)
    examples = [[row["image"], row["question"]] for row in map(episode_row, example_rows(settings))]
    with gr.Blocks(title="vt_trl", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(
            "# How closely does it need to look?\nThe model answers from what it is shown first, or asks to see "
            "more. Looking costs visual tokens."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = upload_field()
                question = gr.Textbox(label="Question", lines=2, max_length=settings.limits.question_chars)
                button = gr.Button("Ask", variant="primary")
                if examples:
                    gr.Examples(examples, [picture, question], cache_examples=False, label="Examples")
            with gr.Column(scale=3, min_width=280):
                shown = gr.HTML(apply_default_css=False, elem_id="shown")
                with gr.Accordion("As data", open=False):
                    data = gr.JSON(show_label=False)
        totals = gr.State(Totals())
        # The decorator of ZeroGPU lends a GPU for one call; elsewhere there is none to be had.
        ask = space.ask if spaces is None else spaces.GPU(space.ask)
        # Emptied first, so that the last answer never stands next to a new question or its refusal.
        emptied = gr.on(
            [button.click, question.submit],
            lambda: ("", None),
            outputs=[shown, data],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        emptied.then(
            ask,
            [picture, question, totals],
            [shown, data, totals],
            api_name="ask",
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=shown,
        )
    return page.queue(max_size=settings.limits.requests)


def example_rows(settings: Settings) -> Any:
    return load_rows(settings.examples) if settings.examples else []


def main() -> None:
    try:
        settings = Settings.read(os.environ)
        page = make_page(settings)
    except (ConfigError, DataError) as error:
        sys.exit(f"The page cannot start. {error}")
    page.launch(
        max_file_size=settings.limits.image_bytes,
        run_history=False,
        footer_links=["api", "gradio"],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{page_css('.episodes')}{CSS}</style>",
    )


if __name__ == "__main__":
    main()
