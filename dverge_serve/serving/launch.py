"""`dverge serve`: check what can be checked, then become `bentoml serve`."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import subprocess
import sys
from typing import Any

from dverge_serve.errors import UserError
from dverge_serve.serving.settings import Settings, variable
from dverge_serve.serving.sockets import require_free

SERVICE = "dverge_serve.service:Dverge"


def serve(host: str, port: int, **flags: Any) -> int:
    """Serve a model over HTTP until interrupted, and return the server's exit code.

    On POSIX this does not return: the process becomes the server.

    Args:
        host: an address or a name of one.
        port: 1 to 65535.
        flags: fields of `Settings`; those that are None are left to the environment.

    Raises:
        UserError: the model, the address or a setting cannot be used.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if given.get("token") == "":
        raise UserError("`token` is empty", "a token", "leave it out to ask for none")
    settings = _with_flags(Settings.from_environment(), given)
    asked = settings.model
    settings = dataclasses.replace(settings, model=asked.resolve())
    if not settings.model.is_file():
        raise UserError(
            f"no model at {asked}",
            "a file written by `dverge export`",
            "run `dverge export model.onnx`, or `dverge demo` for an example",
        )
    host = _address(host)
    require_free(host, port)
    grace = str(math.ceil(settings.timeout_s) * 2 + 5)  # a body and its answer may take this long
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE]
    command += ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", grace]
    environment = settings.environment(os.environ)
    if os.name == "posix":
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, environment)  # noqa: S606
    return subprocess.call(command, env=environment)


def _with_flags(settings: Settings, given: dict[str, Any]) -> Settings:
    """Return the settings with those given by name; an error names these, not their variables."""
    try:
        return dataclasses.replace(settings, **given)
    except UserError as error:
        found = error.found
        for name in given:
            found = found.replace(variable(name), f"`{name}`")
        raise UserError(found, error.expected, error.next_step) from error


def _address(host: str) -> str:
    """Return the IP address of `host`; BentoML takes no names."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"host '{host}' has no address ({error.strerror})", "127.0.0.1") from error
