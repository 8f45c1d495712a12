"""Answers that refuse: one stable JSON body, in the form of OpenAI's API.

`{"error": {"message", "type", "param", "code"}}`; clients act on `code`, of which `CODES` is the
whole list, and people read `message`.
"""

from __future__ import annotations

from typing import Any

CODES = {
    "invalid_json": 400,
    "invalid_multipart": 400,
    "invalid_token": 401,
    "foreign_host": 403,
    "foreign_origin": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_ready": 409,
    "body_too_large": 413,
    "body_too_slow": 408,
    "unsupported_media_type": 415,
    "unknown_field": 422,
    "invalid_value": 422,
    "invalid_prompt": 422,
    "invalid_picture": 422,
    "model_not_found": 422,
    "out_of_bounds": 422,
    "queue_full": 429,
    "client_queue_full": 429,
    "busy": 429,
    "internal": 500,
    "stopping": 503,
    "storage": 507,
}
"""Code -> HTTP status."""


class Refusal(Exception):
    """A request that is not carried out.

    Args:
        code: one of `CODES`.
        message: what is wrong and what would be right; never the client's own text at length.
        param: the field at fault.
        retry_after: seconds after which the same request has a chance.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.code, self.param, self.retry_after = code, param, retry_after
        self.status = CODES[code]

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside those of every answer."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = 'Bearer realm="opensora"'
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers


def quoted(text: object, limit: int = 60) -> str:
    """A client's text for a message or a log: one line, printable, not longer than `limit`.

    What a terminal would act on (escape sequences, line ends, direction marks) is written as
    Python writes it in a literal.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
