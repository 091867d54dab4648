"""The peers: what each needs, what starts it, what it is sent."""

from __future__ import annotations

import base64
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.server import Server

FASTAPI = "fastapi"


@dataclass(frozen=True)
class Peer:
    """A server of others that classifies one image a request.

    Args:
        packages: those that it needs.
        command: what starts it, behind `python -m`; `PORT` is the port.
        json: the request's body, where it is JSON; `IMAGE` is the image in base64.
        health: the route that answers 200 once it is ready.
    """

    packages: tuple[str, ...]
    command: tuple[str, ...]
    json: str = ""
    health: str = "/health"

    def server(self, name: str, picture: bytes) -> Server:
        """Return it as a server under test, which is sent the PNG `picture`."""
        body, kind = picture, "image/png"
        if self.json:
            encoded = base64.b64encode(picture).decode()
            body, kind = self.json.replace("IMAGE", encoded).encode(), "application/json"
        command = [sys.executable, "-m", *self.command]
        return Server(name, command, self.health, body, {"content-type": kind})


PEERS = {
    FASTAPI: Peer(("fastapi", "uvicorn"), ("benchmarks.peers.fastapi_server", "PORT")),
    "fastapi-spinning": Peer(
        ("fastapi", "uvicorn"), ("benchmarks.peers.fastapi_server", "PORT", "spinning")
    ),
    "fastapi-batching": Peer(("fastapi", "uvicorn"), ("benchmarks.peers.fastapi_batching", "PORT")),
    "bentoml": Peer(
        ("bentoml",),
        (
            *("bentoml", "serve", "benchmarks.peers.bentoml_service:Classify"),
            *("--host", "127.0.0.1", "--port", "PORT"),
        ),
        json='{"images": ["IMAGE"]}',
        health="/readyz",
    ),
    "litserve": Peer(
        ("litserve",), ("benchmarks.peers.litserve_server", "PORT"), json='{"image": "IMAGE"}'
    ),
    "ray-serve": Peer(("ray",), ("benchmarks.peers.ray_server", "PORT")),
}


def absent(names: Collection[str]) -> dict[str, str]:
    """Return the peers that cannot run here, each with the reason."""
    found = {}
    for name in names:
        lacking = [package for package in PEERS[name].packages if find_spec(package) is None]
        if lacking:
            found[name] = f"{' and '.join(lacking)} not installed"
    return found
