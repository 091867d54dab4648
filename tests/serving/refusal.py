"""The shape of every refusal."""

from __future__ import annotations

import httpx

from dverge_serve.serving.responses import CODES


def refusal(answer: httpx.Response, code: str) -> str:
    """Check that an answer is the refusal with this code; returns its message."""
    assert answer.status_code == CODES[code], answer.text
    error = answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"
    assert set(error) == {"code", "message"}
    assert error["code"] == code
    return str(error["message"])
