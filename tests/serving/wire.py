"""HTTP by hand: requests no client would send, answers read to their end."""

from __future__ import annotations

import re
import socket


def head(path: str = "/predict", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: test", "content-type: image/png"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status and all bytes of an answer that ends with the connection."""
    data = b""
    while block := connection.recv(65536):
        data += block
    match = re.match(rb"HTTP/1\.1 (\d+)", data)
    assert match, data
    return int(match[1]), data
