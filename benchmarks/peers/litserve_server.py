"""A LitServe server with batches up to 32.

LitServe hands its users JSON or forms, no raw bodies: the image comes as base64 in JSON.

PEER_MODEL=FILE PEER_THREADS=N python -m benchmarks.peers.litserve_server PORT
"""

from __future__ import annotations

import base64
import sys
from typing import Any

import litserve

from benchmarks.peers.classifier import Classifier, Pixels


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.classifier = Classifier.from_environment()

    def decode_request(self, request: dict[str, str]) -> Pixels:
        return self.classifier.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:
        return inputs

    def predict(self, x: list[Pixels]) -> list[dict[str, Any]]:
        return self.classifier.answers(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=32), accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
