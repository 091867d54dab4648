"""A plain FastAPI and onnxruntime server: one synchronous endpoint, uvicorn with uvloop.

PEER_MODEL=FILE PEER_THREADS=N python -m benchmarks.peers.fastapi_server PORT [spinning]
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request

from benchmarks.peers.classifier import Classifier


async def raw_body(request: Request) -> bytes:
    return await request.body()


def application(spinning: bool) -> FastAPI:
    app = FastAPI()
    classifier = Classifier.from_environment(spinning)

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/predict")
    def predict(body: Annotated[bytes, Depends(raw_body)]) -> dict[str, Any]:
        return classifier.answers([classifier.decode(body)])[0]

    return app


def serve(app: FastAPI) -> None:
    """Serve an application on the port that the command line names."""
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    serve(application(spinning="spinning" in sys.argv))
