"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from vt_trl.errors import ConfigError
from vt_trl.images import MAX_DECODED_PIXELS


@dataclass(frozen=True)
class ServeLimits:
    """Limits of one request, and of all at a time (``requests``: in flight, those that wait included).

    ``seconds``: from a request's arrival to its answer. ``body_seconds``: for sending it. ``image_pixels``: as the
    file declares, looked at before it is decoded.
    """

    image_bytes: int = 20 * 2**20
    image_pixels: int = MAX_DECODED_PIXELS
    body_bytes: int = 32 * 2**20
    question_chars: int = 20_000
    requests: int = 256
    seconds: float = 300.0
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"the limit {name} is {value}; it must be above 0.")
