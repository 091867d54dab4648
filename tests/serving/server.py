"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parents[2]
START_S = 60.0


class Server:
    """A running `bentoml serve`.

    Args:
        folder: where it runs; `server.log` is written there.
        command: what is run.
        port: where it listens.
    """

    def __init__(
        self, folder: Path, command: list[str], port: int, environment: dict[str, str]
    ) -> None:
        self.folder, self.port = folder, port
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = folder / "server.log"
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.log}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_S} s: {self.log}")

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # dead, and not yet buried
                if "_bentoml_impl.worker.service" in child.cmdline():
                    found.append(child)
        return found

    def stop(self) -> int:
        """Ask the server to end, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise


def wait_until(true: Callable[[], bool], otherwise: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def clean_environment(**settings: str) -> dict[str, str]:
    """Return this environment without settings of ours, with `settings`."""
    ours = ("DVERGE_", "ORT_", "BENTOML_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, **settings}


def bentoml_serve(folder: Path, port: int, *flags: str, **settings: str) -> Server:
    """Start plain `bentoml serve` in `folder`, which gets our bentofile.yaml."""
    (folder / "bentofile.yaml").write_bytes((ROOT / "bentofile.yaml").read_bytes())
    command = [sys.executable, "-m", "bentoml", "serve", "--port", str(port), *flags]
    return Server(folder, command, port, clean_environment(**settings))


@contextlib.contextmanager
def serving(folder: Path, *flags: str, **settings: str) -> Iterator[Server]:
    """Run a ready server for the length of the block."""
    with starting(folder, *flags, **settings) as server:
        server.wait_until_ready()
        yield server


@contextlib.contextmanager
def starting(folder: Path, *flags: str, **settings: str) -> Iterator[Server]:
    """Run a server for the length of the block, which begins before it is ready."""
    server = bentoml_serve(folder, free_port(), *flags, **settings)
    try:
        yield server
    finally:
        server.stop()
