"""HTTP as hostile or old callers speak it, byte by byte against a real server."""

from __future__ import annotations

import socket
import subprocess
import time

import httpx
import pytest

from tests.serving import tiny
from tests.serving.server import Server

UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
PLAIN = b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n"


def talk(server: Server, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send pieces, each as a segment of its own; return what comes until nothing more does."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        connection.settimeout(2)
        try:
            while block := connection.recv(65536):
                found += block
        except TimeoutError:
            pass
    return found


def post(headers: bytes, length: int) -> bytes:
    return b"POST /predict HTTP/1.1\r\nhost: test\r\n%scontent-length: %d\r\n\r\n" % (
        headers,
        length,
    )


@pytest.mark.parametrize("split", ["together", "apart", "bytes"])
def test_an_upgrade_is_ignored_and_the_body_is_the_body(server: Server, split: str) -> None:
    body = tiny.png(255)
    head = post(UPGRADE, len(body))
    pieces = {
        "together": [head + body],
        "apart": [head, body],
        "bytes": [head[:30], head[30:-1], head[-1:], body[:1], body[1:]],
    }[split]
    answers = talk(server, *pieces, PLAIN)
    assert answers.count(b"HTTP/1.1 200 OK") == 2, answers
    assert b'"label":"bright"' in answers
    assert answers.endswith(b"alive\n")


def test_a_body_behind_an_upgrade_is_never_a_request(server: Server) -> None:
    inner = b"GET /model HTTP/1.1\r\nhost: test\r\n\r\n"
    for head in (
        post(UPGRADE, len(inner)) + inner,
        b"POST /predict HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n"
        + UPGRADE
        + b"\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner),
    ):
        answers = talk(server, head)
        assert answers.count(b"HTTP/1.1 ") == 1, answers
        assert b"not_an_image" in answers


def test_curl_that_offers_http_2_is_answered(server: Server) -> None:
    (server.folder / "offer.png").write_bytes(tiny.png(255))
    command = [
        "curl",
        "-s",
        "--http2",
        "-H",
        "content-type: image/png",
        "--data-binary",
        "@offer.png",
        f"{server.url}/predict",
    ]
    output = subprocess.check_output(command, cwd=server.folder)
    assert b'"label":"bright"' in output


def test_a_half_closed_caller_gets_its_answer(server: Server) -> None:
    body = tiny.png(255)
    answer = talk(server, post(b"", len(body)) + body, half_close=True)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b'"label":"bright"' in answer
    # A body cut short has no answer: it will never be whole.
    assert talk(server, post(b"", len(body) + 1) + body, half_close=True) == b""


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"host: a\r\nhost: b\r\n",
        b"host: a\r\ntransfer-encoding: gzip, chunked\r\n",
        b"host: a\r\ntransfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n",
    ],
    ids=["no host", "two hosts", "gzip and chunked", "gzip, then chunked"],
)
def test_what_proxies_read_differently_is_refused(server: Server, lines: bytes) -> None:
    answer = talk(server, b"POST /predict HTTP/1.1\r\n" + lines + b"\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


def test_http_1_0_needs_no_host(server: Server) -> None:
    assert talk(server, b"GET /livez HTTP/1.0\r\n\r\n").endswith(b"alive\n")


def test_trailers_are_no_headers(server: Server) -> None:
    """They come after the checks: a second host or a token in them must count for nothing."""
    body = tiny.png(255)
    head = b"POST /predict HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = talk(server, head + b"%x\r\n%s\r\n0\r\nhost: other\r\n\r\n" % (len(body), body))
    assert answer.startswith(b"HTTP/1.1 200 OK"), answer


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (b"GET /livez HTTP/1.1\r\nhost: test\r\nx: ", b"x" * 65536),
        (b"GET /livez HTTP/1.1\r\nhost: test\r\n", b"x: y\r\n" * 10_000),
        (b"GET /", b"x" * 65536),
        (post(b"transfer-encoding: chunked\r\n", 0).replace(b"content-length: 0\r\n", b""), b""),
    ],
    ids=["one header", "many headers", "a target", "a chunk's extension"],
)
def test_framing_without_end_is_cut_off(server: Server, begin: bytes, again: bytes) -> None:
    again = again or b"5;" + b"x" * 65536
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(begin)
        with pytest.raises(OSError):  # noqa: PT011, PT012 - reset, or a broken pipe
            for _ in range(1000):
                connection.sendall(again)
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_chunks_of_one_byte_are_cut_off(server: Server) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        with pytest.raises(OSError):  # noqa: PT011, PT012 - reset, or a broken pipe
            for _ in range(1000):
                connection.sendall(b"1\r\nx\r\n" * 20_000)
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_a_flood_of_requests_ahead_is_answered_so_far_and_no_further(server: Server) -> None:
    answers = talk(server, PLAIN * 5000)
    assert 1 <= answers.count(b"alive\n") <= 100
