"""A plain BentoML service whose API is batchable, up to 32 images; one worker.

A batchable API takes a list, and each caller sends a list of one. Typed inputs take no list of raw
bodies: the image comes as base64 in JSON.

PEER_MODEL=FILE PEER_THREADS=N bentoml serve benchmarks.peers.bentoml_service:Classify --port PORT
"""

from __future__ import annotations

import base64
from typing import Any

import bentoml

from benchmarks.peers.classifier import Classifier


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classify:
    def __init__(self) -> None:
        self.classifier = Classifier.from_environment()

    # BentoML answers 503 where it expects to take longer than `max_latency_ms`.
    @bentoml.api(  # type: ignore[untyped-decorator]
        batchable=True, max_batch_size=32, max_latency_ms=10_000
    )
    def predict(self, images: list[str]) -> list[dict[str, Any]]:
        decoded = [self.classifier.decode(base64.b64decode(image)) for image in images]
        return self.classifier.answers(decoded)
