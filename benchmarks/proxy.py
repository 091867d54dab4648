"""nginx with the configuration that `deploy/` ships, in front of servers on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.server import free_port

CONFIGURATION = Path(__file__).parents[1] / "deploy" / "nginx.conf"
# Debian keeps it where only root looks.
NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
START_S = 10.0


def configuration(replicas: Sequence[int], port: int, folder: Path) -> str:
    """Return the shipped configuration with the addresses and folders of a run on this machine.

    One thing more is changed: no rate for one caller, as all load comes from one address.

    Args:
        replicas: ports of the service on 127.0.0.1.
        port: where the proxy listens.
        folder: where it writes.

    Raises:
        ValueError: the shipped file no longer has a line that is changed.
    """
    servers = " ".join(f"server 127.0.0.1:{replica}\\1;" for replica in replicas)
    changes = {
        r"server dverge:3000 resolve(.*);": servers,
        r"listen 8080;": f"listen 127.0.0.1:{port};",
        r"pid /tmp/nginx.pid;": f"pid {folder}/nginx.pid;\nuser root;",
        r"rate=100r/s;": "rate=1000000r/s;",
        r"http \{": "http {\n" + _files(folder),
    }
    text = CONFIGURATION.read_text()
    for old, new in changes.items():
        text, count = re.subn(old, new, text)
        if count != 1:
            raise ValueError(f"{CONFIGURATION} has {count} lines like {old!r}")
    return text


def _files(folder: Path) -> str:
    """Return directives for what nginx writes, in place of the folders that it was built with."""
    assert NGINX
    built = subprocess.run([NGINX, "-V"], capture_output=True, text=True, check=True).stderr
    names = [name.replace("-", "_") for name in re.findall(r"--http-([\w-]+)-temp-path", built)]
    lines = [f"{name}_temp_path {folder}/{name};" for name in names]
    return "\n".join([*lines, f"access_log {folder}/access.log;"])


def check(replicas: Sequence[int], folder: Path) -> str:
    """Let nginx test the configuration; return what it says.

    Raises:
        subprocess.CalledProcessError: it does not take it.
    """
    command = _command(replicas, free_port(), folder)
    done = subprocess.run([*command, "-t"], capture_output=True, text=True, check=True)
    return done.stderr


@contextlib.contextmanager
def proxying(replicas: Sequence[int], folder: Path) -> Iterator[int]:
    """Run nginx for the length of the block; gives its port.

    Args:
        replicas: ports of the service on 127.0.0.1.
        folder: made if need be; configuration and logs are written there.
    """
    port = free_port()
    command = _command(replicas, port, folder)
    with subprocess.Popen([*command, "-g", "daemon off;"]) as process:
        try:
            _wait(process, port)
            yield port
        finally:
            process.terminate()


def _command(replicas: Sequence[int], port: int, folder: Path) -> list[str]:
    assert NGINX
    folder.mkdir(exist_ok=True)
    file = folder / "nginx.conf"
    file.write_text(configuration(replicas, port, folder))
    return [NGINX, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(file)]


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("nginx does not start: see its error.log")
        time.sleep(0.05)
