from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from dverge_serve.serving.protocol import Protocol

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """A connection that keeps what is sent at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def answer(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-length", b"6")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"alive\n"})


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def protocol(wire: Wire) -> AsyncIterator[Protocol]:
    config = uvicorn.Config(answer)
    config.load()
    protocol = Protocol(config, ServerState(), {})
    protocol.connection_made(wire)
    yield protocol
    protocol.connection_lost(None)


async def let_it_answer() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_headers_and_body_leave_together(protocol: Protocol, wire: Wire) -> None:
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
    await let_it_answer()
    (whole,) = wire.sent
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
    assert whole.endswith(b"\r\n\r\nalive\n")
    assert not wire.closed


async def test_an_answer_does_not_wait_for_what_the_application_does_after_it(wire: Wire) -> None:
    sent_in_time: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await answer(scope, receive, send)
        sent_in_time.append(len(wire.sent))

    config = uvicorn.Config(application)
    config.load()
    protocol = Protocol(config, ServerState(), {})
    protocol.connection_made(wire)
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
    await let_it_answer()
    protocol.connection_lost(None)
    assert sent_in_time == [1]


async def test_an_answer_is_sent_before_the_connection_closes(
    protocol: Protocol, wire: Wire
) -> None:
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
    await let_it_answer()
    assert b"".join(wire.sent).endswith(b"alive\n")
    assert wire.closed


async def test_an_answer_is_sent_before_a_caller_who_has_closed_is_let_go(
    protocol: Protocol, wire: Wire
) -> None:
    protocol.transport.write(b"refused")
    assert protocol.eof_received() is False  # the transport closes now
    assert wire.sent == [b"refused"]


async def test_nothing_is_sent_on_a_closed_connection(protocol: Protocol, wire: Wire) -> None:
    protocol.transport.write(b"late")
    wire.closed = True
    await let_it_answer()
    assert wire.sent == []
