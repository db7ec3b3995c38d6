"""What can go wrong with a request, in the JSON that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal. ``status`` is HTTP's, ``code`` a stable word for programs, ``param`` the field of the request."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {...}}``, with the type that OpenAI gives to this status."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, code: str, param: str | None = "messages") -> ApiError:
    return ApiError(400, message, code, param)
