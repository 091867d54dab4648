"""Slow senders: given up below the least rate, and first to make room for quick ones."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from dverge_serve.serving import requests
from dverge_serve.serving.requests import BodyBudget, Request
from dverge_serve.serving.responses import ServiceError
from tests.serving import tiny
from tests.serving.server import serving
from tests.serving.wire import head

LIMIT = 1000


def sender(pieces: Sequence[bytes], pause_s: float, ends: bool = True) -> Request:
    """Return a request whose body comes in these pieces."""

    async def come() -> AsyncIterator[dict[str, object]]:
        for number, piece in enumerate(pieces, start=1):
            await asyncio.sleep(pause_s)
            more = not ends or number < len(pieces)
            yield {"type": "http.request", "body": piece, "more_body": more}
        await asyncio.sleep(3600)

    pending = come()
    scope = {"method": "POST", "path": "/predict", "headers": []}
    return Request(scope, pending.__anext__, "id")


async def read(request: Request, budget: BodyBudget, seconds: float = 60) -> bytes | str:
    """Return the body, or the code of the refusal."""
    with request.holding(budget):
        try:
            return await request.body(LIMIT, seconds, budget)
        except ServiceError as error:
            return f"{error.code}: {error.message}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GRACE_S", 0.3)
    monkeypatch.setattr(requests, "LEAST_RATE", 100)


@pytest.mark.anyio
async def test_a_body_below_the_least_rate_is_given_up(impatient: None) -> None:
    budget = BodyBudget(LIMIT)
    begun = time.monotonic()
    found = await read(sender([b"x"] * 1000, 0.05), budget)
    assert found == "body_timeout: the body did not arrive at 100 bytes a second"
    assert 0.3 <= time.monotonic() - begun < 10
    # What came quickly at first buys no more than the grace.
    found = await read(sender([b"x" * 900], 0, ends=False), budget)
    assert found == "body_timeout: the body did not arrive at 100 bytes a second"
    assert (budget.held, budget.arriving) == (0, set())


@pytest.mark.anyio
async def test_a_body_above_the_least_rate_may_take_longer_than_the_grace(impatient: None) -> None:
    assert await read(sender([b"x" * 60] * 10, 0.1), BodyBudget(LIMIT)) == b"x" * 600


@pytest.mark.anyio
async def test_the_slowest_large_body_makes_room() -> None:
    budget = BodyBudget(3 * LIMIT)
    stalled = [asyncio.create_task(read(sender([b"x" * 990], 0, False), budget)) for _ in range(3)]
    small = asyncio.create_task(read(sender([b"x"], 0, False), budget))
    await asyncio.sleep(0.05)
    assert await read(sender([b"y" * 500] * 2, 0.01), budget) == b"y" * 1000
    await asyncio.sleep(0)
    given_up = [task for task in stalled if task.done()]
    assert len(given_up) == 1
    assert (await given_up[0]).startswith("queue_full")  # type: ignore[arg-type]
    assert not small.done()  # it holds less than its share
    for task in (*stalled, small):
        task.cancel()
    await asyncio.gather(*stalled, small, return_exceptions=True)
    assert (budget.held, budget.arriving) == (0, set())


@pytest.mark.anyio
async def test_bodies_that_have_come_are_not_given_up() -> None:
    budget = BodyBudget(LIMIT)
    done = sender([b"x" * 900], 0)
    with done.holding(budget):
        assert await done.body(LIMIT, 60, budget) == b"x" * 900
        assert (await read(sender([b"y" * 900], 0), budget)).startswith("queue_full")  # type: ignore[arg-type]
        assert await read(sender([b"y" * 100], 0), budget) == b"y" * 100


def test_slow_uploads_do_not_lock_out_quick_callers(tmp_path: Path) -> None:
    """Each sends all but its last byte; together they are more than all that may be held."""
    tiny.save_gray_model(tmp_path / "model.onnx")
    length = 500_000
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, DVERGE_MAX_BODY_BYTES=str(length)))
        for _ in range(20):
            address = ("127.0.0.1", server.port)
            slow = stack.enter_context(socket.create_connection(address, timeout=20))
            slow.sendall(head(content_length=str(length)) + b"x" * (length - 1))
        for _ in range(5):
            answer = httpx.post(f"{server.url}/predict", content=tiny.png(255), timeout=20)
            assert answer.status_code == 200, answer.text
            large = httpx.post(f"{server.url}/predict", content=b"x" * length, timeout=20)
            assert large.json()["error"]["code"] == "not_an_image"
