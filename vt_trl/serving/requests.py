"""A chat-completions request, checked: a question and its picture, or several, and how to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vt_trl.errors import DataError
from vt_trl.generation.base import SamplingSettings
from vt_trl.rows import clean_question, numbered_question
from vt_trl.serving.errors import ApiError, bad_request
from vt_trl.serving.limits import ServeLimits


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """Where a picture is. ``detail`` is accepted and not used: the policy decides how closely it looks."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextContent(_Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImageContent(_Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One message, the user's."""

    role: str
    content: str | list[Annotated[TextContent | ImageContent, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Strict):
    """``include_usage``: a last chunk with the usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Extension(_Strict):
    """What other servers do not have.

    ``turns``: give the turns back, too. ``id``: of the row; with ``seed`` it is part of what is drawn, as in training.
    """

    turns: bool = False
    id: Annotated[str, Field(max_length=200)] | None = None


class ChatRequest(_Strict):
    """The body of ``POST /v1/chat/completions``. A field that would not be honoured is refused, not ignored."""

    model: str
    messages: list[ChatMessage]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # whose request it is; never used
    vt_trl: Extension = Extension()

    @property
    def settings(self) -> SamplingSettings:
        """Greedy unless a temperature is given."""
        temperature = self.temperature or 0.0
        top_p = 1.0 if self.top_p is None else self.top_p
        return SamplingSettings(temperature, top_p, seed=self.seed) if temperature else SamplingSettings(0.0)


@dataclass(frozen=True)
class Asked:
    """What a request asks: where its pictures are, the question, and how to answer."""

    urls: tuple[str, ...]
    question: str
    settings: SamplingSettings
    max_tokens: int | None
    stream: bool
    include_usage: bool
    turns: bool
    id: str | None

    def row(self, images: list[Any]) -> dict[str, Any]:
        """The row that an environment gets."""
        pictures = {"image": images[0]} | ({"images": images} if len(images) > 1 else {})
        return {"id": self.id, **pictures, "question": self.question, "answer": [], "data_source": "serve"}


def read_request(body: bytes, model: str, limits: ServeLimits, most_tokens: int, most_pictures: int = 1) -> Asked:
    """The request in a body. Raises ApiError (400) that names the field.

    ``most_tokens``: sampled tokens of an answer at most, all turns together; ``most_pictures``: of one question.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    if request.model != model:
        raise bad_request(f"There is no model of that name; this server has {model!r}.", "model_not_found", "model")
    name = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
    tokens = getattr(request, name)
    if tokens is not None and tokens > most_tokens:
        raise bad_request(f"{name} is {tokens}, and this server allows {most_tokens}.", "too_many_tokens", name)
    urls, question = _content(request.messages, most_pictures)
    if len(question) > limits.question_chars:
        raise bad_request(f"The question has more than {limits.question_chars} characters.", "question_too_long")
    try:
        question = numbered_question(question) if len(urls) > 1 else clean_question(question)
    except DataError as error:
        raise bad_request(f"{error.reason}.", "bad_question") from None
    if not question.strip():
        raise bad_request("There is no question; add a text part to the message.", "no_question")
    options = request.stream_options or StreamOptions()
    wanted = request.vt_trl
    stream = bool(request.stream)
    return Asked(urls, question, request.settings, tokens, stream, options.include_usage, wanted.turns, wanted.id)


def _content(messages: list[ChatMessage], most: int) -> tuple[tuple[str, ...], str]:
    """The addresses of the pictures, and the question."""
    if len(messages) != 1 or messages[0].role != "user":
        raise bad_request(
            "Send one user message with an image and a question. System texts and earlier turns are the "
            "environment's own here.",
            "unsupported_messages",
        )
    content = messages[0].content
    parts = [TextContent(type="text", text=content)] if isinstance(content, str) else content
    urls = tuple(part.image_url.url for part in parts if isinstance(part, ImageContent))
    if not 1 <= len(urls) <= most:
        code = "too_many_images" if urls else "no_image"
        wanted = "exactly one, as an image_url part" if most == 1 else f"1 to {most}, as image_url parts"
        raise bad_request(f"The message has {len(urls)} images; send {wanted}.", code)
    return urls, "\n".join(part.text for part in parts if isinstance(part, TextContent))


def _explained(error: ValidationError) -> ApiError:
    """The first thing wrong, without what was sent, which can be megabytes."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    code = "unsupported_parameter" if first["type"] == "extra_forbidden" else "invalid_request"
    about = f"{where}: " if where else ""
    message = "this server does not know this parameter" if first["type"] == "extra_forbidden" else first["msg"]
    return bad_request(f"{about}{message[:300]}.", code, where or None)
