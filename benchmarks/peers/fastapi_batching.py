"""FastAPI with batches formed by hand: a queue, and one thread that runs the model.

A batch holds the images of 2 ms, at most 32. They are decoded in the event loop's pool of threads.

PEER_MODEL=FILE PEER_THREADS=N python -m benchmarks.peers.fastapi_batching PORT
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request

from benchmarks.peers.classifier import Classifier, Pixels
from benchmarks.peers.fastapi_server import serve

MAX_BATCH, WINDOW_S = 32, 0.002
Job = tuple[Pixels, "asyncio.Future[dict[str, Any]]"]


async def run_batches(queue: asyncio.Queue[Job], classifier: Classifier) -> None:
    loop, engine = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    while True:
        batch = [await queue.get()]
        try:
            async with asyncio.timeout(WINDOW_S):
                while len(batch) < MAX_BATCH:
                    batch.append(await queue.get())
        except TimeoutError:
            pass
        images = [pixels for pixels, _ in batch]
        try:
            answers = await loop.run_in_executor(engine, classifier.answers, images)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():  # else its caller has gone
                    future.set_result(answer)


def application() -> FastAPI:
    classifier = Classifier.from_environment()
    queue: asyncio.Queue[Job] = asyncio.Queue()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batches = asyncio.create_task(run_batches(queue, classifier))
        yield
        batches.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(None, classifier.decode, await request.body())
        future: asyncio.Future[dict[str, Any]] = loop.create_future()
        queue.put_nowait((pixels, future))
        return await future

    return app


if __name__ == "__main__":
    serve(application())
