"""A server under test, and the load that `wrk` puts on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parent / "load.lua"
DRAIN_S = 0.5


@dataclass
class Server:
    """A server under test: what starts it, what it is sent."""

    name: str
    command: list[str]
    health: str
    body: bytes
    headers: dict[str, str]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, environment: dict[str, str], log: Path) -> None:
        self.port = self.port or free_port()  # started again, it is where it was
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{self.port}{self.health}"
                urllib.request.urlopen(url, timeout=2).close()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} does not start:\n{log.read_text()}")
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Signal the server and its workers, which live in sessions of their own."""
        assert self.process
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            for process in [*main.children(recursive=True), main]:
                process.send_signal(number)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)


def load(
    server: Server, path: str, body: Path, headers: dict[str, str], connections: int, seconds: int
) -> dict[str, float]:
    """Return what `wrk` measured, after a second of warming up."""
    with server.awake():
        for duration in (1, seconds):
            result = wrk(server.port, path, body, headers, connections, duration)
            # What the warming up left behind would delay the first that are measured. And stopped
            # in the middle of a batch, a server that learns from times would learn of minutes.
            time.sleep(DRAIN_S)
    if result["errors"]:
        raise SystemExit(f"{server.name} answered with errors: {result}")
    if not result["requests"]:
        raise SystemExit(f"{server.name} answered nothing in {seconds} s: take more --seconds")
    per_s = result["requests"] / result["seconds"]
    return {"per_s": per_s, "p50_ms": result["p50_ms"], "p99_ms": result["p99_ms"]}


def wrk(
    port: int, path: str, body: Path, headers: dict[str, str], connections: int, seconds: int
) -> dict[str, float]:
    """Return what `wrk` measured: requests, seconds, p50_ms, p99_ms, max_ms, errors."""
    return result_of(start_wrk(port, path, body, headers, connections, seconds))


def start_wrk(
    port: int, path: str, body: Path, headers: dict[str, str], connections: int, seconds: int
) -> subprocess.Popen[str]:
    """Start `wrk`; it ends by itself after `seconds`, or when interrupted."""
    lines = "\n".join(f"{name}: {value}" for name, value in headers.items())
    return subprocess.Popen(
        [
            *("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"),
            *("-s", str(SCRIPT), f"http://127.0.0.1:{port}{path}"),
        ],
        env={**os.environ, "LOAD_BODY": str(body), "LOAD_HEADERS": lines},
        stdout=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return what a started `wrk` measured, once it has ended."""
    told = process.communicate()[0]
    found = re.search(r"^RESULT (.*)$", told, re.MULTILINE)
    assert found, told
    result: dict[str, float] = json.loads(found[1])
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
