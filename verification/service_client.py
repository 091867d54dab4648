"""The client of a live service: 8-bit PNGs through `/predict`, within a budget and a rate."""

from __future__ import annotations

import http.client
import io
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

from dverge_serve.errors import UserError
from verification.attacks.outcomes import Pixels

TIMEOUT_S = 30.0
BUSY_S = (1.0, 2.0, 4.0)  # waits before a request that was answered 503 is sent again
LEAST = -20.0  # log-probability of a class that the service leaves out
NEXT_STEPS = {
    401: "set DVERGE_TOKEN to its token",
    404: "of a server of the Open Inference Protocol, give http://host:port/v2/models/NAME",
}


class RefusedError(UserError):
    """The service's watch for attacks by queries refused a query."""


@dataclass
class Service:
    """A live service: its address, and the requests made so far.

    As a context manager it closes its connection at the end; a later request opens another.

    Args:
        url: `http://host:port`; https works as well.
        classes: how many the model has.
        requests: most requests in total.
        rate: most requests a second.
        token: sent as a bearer token, if there is one.
        flagged: answers that the service's watch for attacks by queries marked or refused.
    """

    url: str
    classes: int
    requests: int = 2000
    rate: float = 50.0
    token: str = field(default_factory=lambda: os.environ.get("DVERGE_TOKEN", ""), repr=False)
    asked: int = 0
    flagged: int = 0
    exposed: set[str] = field(default_factory=set)
    sha256: str = ""

    content_type = "image/png"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"`url` {self.url}", "http://host:port")
        try:
            port = parts.port
        except ValueError as error:
            raise UserError(f"`url` {self.url}", "a port from 1 to 65535") from error
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._connection = kind(parts.hostname, port, timeout=TIMEOUT_S)
        self._path = parts.path.rstrip("/") + "/predict"
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def exposure(self) -> str:
        """How much the service exposes, as a value of its setting `DVERGE_EXPOSE`."""
        if "disagreement" in self.exposed:
            return "full"
        return "scores" if "top" in self.exposed else "label"

    @property
    def left(self) -> int:
        """Requests that may still be made."""
        return self.requests - self.asked

    def scores(self, images: Pixels) -> npt.NDArray[np.float32]:
        """Return the service's scores of 8-bit images `[n, C, H, W]`, one request each.

        Returns:
            log-probabilities `[n, classes]` as far as the service gives them; where it gives
            labels alone, 0 for the label and `LEAST` for the others.
        """
        return np.array(
            [self._answer(self._ask(self._body(image))) for image in images], np.float32
        )

    def _ask(self, body: bytes | None, path: str = "") -> bytes:
        """Return the answer to one request: a POST of `body`, or a GET without one."""
        for wait in (*BUSY_S, None):
            response, text = self._send(body, path or self._path)
            if response.status != 503 or wait is None:
                break
            time.sleep(wait)  # it is busy: try again later
        code = response.headers.get("X-Error-Code", "") or text[:200].decode("latin-1")
        refused = response.status == 429 and "near_copies" in code
        self.flagged += refused or "X-Near-Copies" in response.headers
        if refused:
            raise RefusedError(
                "the service answered 429: too many near-copies of one image",
                "200",
                "its watch for attacks by queries takes so many a day; see DVERGE_WATCH_BUDGET",
            )
        if response.status != 200:
            raise UserError(
                f"the service answered {response.status} to {path or self._path}",
                "200",
                NEXT_STEPS.get(response.status, "look at its log"),
            )
        self.sha256 = response.headers.get("X-Model-Sha256", "")
        return text

    def _body(self, image: Pixels) -> bytes:
        return _png(image)

    def _answer(self, text: bytes) -> npt.NDArray[np.float64]:
        try:
            (answer,) = json.loads(text)["predictions"]
            return self._read(answer)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                "the service's answer is not ours", "POST /predict of dverge"
            ) from error

    def _send(self, body: bytes | None, path: str) -> tuple[http.client.HTTPResponse, bytes]:
        """Send one request within budget and rate; reopen a connection closed while idle."""
        if self.left <= 0:
            raise UserError(f"the budget of {self.requests} requests is spent", "a larger one")
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + 1 / self.rate
        self.asked += 1
        headers = {"content-type": self.content_type}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"
        idle = self._connection.sock is not None
        while True:
            try:
                self._connection.request("GET" if body is None else "POST", path, body, headers)
                response = self._connection.getresponse()
                return response, response.read()
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if idle and isinstance(error, ConnectionError):
                    idle = False
                    continue
                raise UserError(
                    f"no answer from {urlsplit(self.url).netloc} ({type(error).__name__})",
                    "a running service",
                ) from error

    def _read(self, answer: dict[str, Any]) -> npt.NDArray[np.float64]:
        self.exposed |= set(answer)
        scores = np.full(self.classes, LEAST)
        scores[int(answer["index"])] = 0.0
        for entry in answer.get("top", []):
            scores[int(entry["index"])] = math.log(max(float(entry["probability"]), 1e-9))
        return scores


def _png(image: Pixels) -> bytes:
    out = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
