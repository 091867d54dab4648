"""Bodies too large, too slow or unasked for, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import time

import httpx

from tests.serving.server import Server
from tests.serving.tiny import PNG
from tests.serving.wire import head, read_answer


def test_a_declared_large_body_is_refused_unread(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(
            head(content_length=str(10**12), authorization="Bearer secret") + b"x" * 1000
        )
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 413
    assert b"body_too_large" in data
    assert b"connection: close" in data


def test_a_chunked_large_body_is_refused_before_it_ends(strict: Server) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(transfer_encoding="chunked", authorization="Bearer secret"))
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        # Never ends by itself: only the answer stops it.
        while sent < 100_000_000:
            connection.sendall(chunk)
            sent += 10_000
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if connection.recv(1, socket.MSG_PEEK):
                    break
            connection.settimeout(20)
        connection.settimeout(20)
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 413
    assert b"body_too_large" in data
    assert sent < 100_000_000


def test_a_client_that_sends_all_first_still_reads_its_413(strict: Server) -> None:
    answer = httpx.post(
        f"{strict.url}/predict",
        content=b"x" * 3_000_000,
        headers={**PNG, "authorization": "Bearer secret"},
    )
    assert answer.status_code == 413


def test_a_body_that_stalls_is_408(strict: Server) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(content_length="1000", authorization="Bearer secret") + b"x")
        status, data = read_answer(connection)
    assert status == 408
    assert b"body_timeout" in data
    assert time.monotonic() - begun >= 1  # not before the time allowed


def test_without_the_token_a_body_is_not_even_read(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(content_length="90000") + b"x")
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 401
    assert b"unauthorized" in data


def test_what_is_not_http_is_turned_away(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 this is not http\r\n\r\n")
        status, _ = read_answer(connection)
    assert status == 400
    assert httpx.get(f"{strict.url}/livez").status_code == 200
