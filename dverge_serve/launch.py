"""`dverge serve`: check what can be checked, then become `bentoml serve`."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError
from dverge_serve.listening import require_free
from dverge_serve.settings import Settings

SERVICE = "dverge_serve.service:Dverge"


def serve(
    model: Path, *, host: str, port: int, workers: int, token: str | None, device: str
) -> None:
    """Serve `model` over HTTP until interrupted.

    On POSIX this does not return: the process becomes the server.

    Args:
        model: the model file.
        host: an address or a name of one.
        port: 1 to 65535.
        workers: processes; 1 leaves it to DVERGE_WORKERS.
        token: bearer token to ask for; None leaves it to DVERGE_TOKEN.
        device: `auto` leaves it to DVERGE_DEVICE.

    Raises:
        UserError: the model, the address or a setting cannot be used.
    """
    settings = _settings(model, workers, token, device)
    host = _address(host)
    require_free(host, port)
    if not settings.model.is_file():
        raise UserError(
            f"no model at {model}",
            "a file written by `dverge export`",
            "run `dverge export model.onnx`, or `dverge demo` for an example",
        )
    grace = str(math.ceil(settings.timeout_s) * 2 + 5)  # a body and its answer may take this long
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE]
    command += ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", grace]
    environment = {**os.environ, **settings.environment()}
    if os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, environment)  # noqa: S606
    raise SystemExit(subprocess.call(command, env=environment))


def _settings(model: Path, workers: int, token: str | None, device: str) -> Settings:
    flags: dict[str, Any] = {"model": model.resolve()}
    if workers != 1:
        flags["workers"] = workers
    if token is not None:
        flags["token"] = token
    if device != "auto":
        flags["device"] = device
    return dataclasses.replace(Settings.from_environment(), **flags)


def _address(host: str) -> str:
    """Return the IP address of `host`; BentoML takes no names."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"host '{host}' has no address ({error.strerror})", "127.0.0.1") from error
