"""A plain FastAPI and onnxruntime server: one synchronous endpoint, uvicorn with uvloop.

python -m benchmarks.peers.fastapi_server MODEL PORT THREADS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import onnxruntime as ort
import uvicorn
from fastapi import Depends, FastAPI, Request

from benchmarks.peers.classifier import Classifier


async def raw_body(request: Request) -> bytes:
    return await request.body()


def application(model: Path, threads: int) -> FastAPI:
    app = FastAPI()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as ours
    classifier = Classifier(ort.InferenceSession(model, options, ["CPUExecutionProvider"]))

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(body: Annotated[bytes, Depends(raw_body)]) -> dict[str, Any]:
        return classifier.answers([classifier.decode(body)])[0]

    return app


if __name__ == "__main__":
    uvicorn.run(
        application(Path(sys.argv[1]), int(sys.argv[3])),
        port=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )
