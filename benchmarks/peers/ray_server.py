"""Ray Serve with `@serve.batch`, up to 32 images of 2 ms; one replica, everything on this machine.

PEER_MODEL=FILE PEER_THREADS=N python -m benchmarks.peers.ray_server PORT
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any, cast

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.classifier import Classifier

QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@serve.deployment(max_ongoing_requests=256, logging_config=QUIET)
class Classify:
    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def answers(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        return self.classifier.answers(list(map(self.classifier.decode, bodies)))

    async def __call__(self, request: Request) -> Any:
        if request.url.path == "/health":
            return "ok"
        return await self.answers(await request.body())


if __name__ == "__main__":
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    serve.start(http_options={"port": int(sys.argv[1])}, logging_config=QUIET)
    serve.run(cast(Any, Classify).bind())
    signal.pause()
