"""Responses to callers, and the closed set of error codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
HTML = b"text/html; charset=utf-8"

Headers = tuple[tuple[bytes, bytes], ...]

RETRY_AFTER_S = 1
_ENCODER = msgspec.json.Encoder()

# Every error code there is, with its HTTP status. Clients may switch on them; add, never change.
CODES: dict[str, int] = {
    "bad_request": 400,
    "bad_multipart": 400,
    "bad_tensor": 400,
    "no_images": 400,
    "empty_image": 400,
    "not_an_image": 400,
    "broken_image": 400,
    "animated_image": 400,
    "unauthorized": 401,
    "not_found": 404,
    "no_report": 404,
    "no_examples": 404,
    "not_exposed": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "reload_refused": 409,
    "body_too_large": 413,
    "image_too_large": 413,
    "too_many_images": 413,
    "unsupported_content_type": 415,
    "near_copies": 429,
    "internal_error": 500,
    "starting": 503,
    "queue_full": 503,
    "timeout": 504,
}


@dataclass(slots=True, frozen=True)
class Response:
    """A whole HTTP response."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: Headers = ()


class ServiceError(Exception):
    """A request that is not served, and why. `code` is one of `CODES`."""

    def __init__(self, code: str, message: str, headers: Headers = ()) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.status = CODES[code]
        self.headers = headers
        if self.status == 503:
            self.headers += ((b"retry-after", b"%d" % RETRY_AFTER_S),)

    def response(self, *, v2: bool = False) -> Response:
        """Return the error as a response; under `/v2/` in that protocol's own shape."""
        error = self.message if v2 else {"code": self.code, "message": self.message}
        headers = (*self.headers, (b"x-error-code", self.code.encode())) if v2 else self.headers
        return Response(self.status, dump({"error": error}), JSON, headers)


def dump(value: Any) -> bytes:
    """Return `value`, of which dataclasses may be part, as JSON bytes."""
    return _ENCODER.encode(value)


def json_response(value: Any, status: int = 200) -> Response:
    """Return `value` as a JSON response."""
    return Response(status, dump(value))
