"""Every refusal, over the application in this process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from dverge_serve.serving.app import App
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.worker import Worker
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.refusal import refusal
from tests.serving.tiny import PNG

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/vnd.bentoml+pickle",
        "application/pickle",
        "image/gif",
        "text/uri-list",
    ],
)
async def test_other_content_types_are_415(start: Start, kind: str) -> None:
    client = await start()
    answer = await client.post("/predict", content=tiny.png(0), headers={"content-type": kind})
    assert "image/png" in refusal(answer, "unsupported_content_type")


async def test_encoded_bodies_are_415(start: Start) -> None:
    client = await start()
    headers = {**PNG, "content-encoding": "gzip"}
    answer = await client.post("/predict", content=tiny.png(0), headers=headers)
    refusal(answer, "unsupported_content_type")


async def test_one_bad_image_of_several_is_named_by_its_position(start: Start) -> None:
    client = await start()
    files = [("images", tiny.png(0)), ("images", b"junk"), ("images", tiny.png(0))]
    answer = await client.post("/predict", files=files)
    assert refusal(answer, "not_an_image").startswith("image 2 of 3: ")


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"", "multipart/form-data", "bad_multipart"),
        (b"", "multipart/form-data; boundary=b", "bad_multipart"),
        (b"--b--\r\n", "multipart/form-data; boundary=b", "no_images"),
        (b"junk", "multipart/form-data; boundary=b", "bad_multipart"),
        (
            b'--b\r\ncontent-disposition: form-data; name="images"\r\n\r\ncut',
            "multipart/form-data; boundary=b",
            "bad_multipart",
        ),
        (
            b'--b\r\ncontent-disposition: form-data; name="url"\r\n\r\nhttp://x\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "bad_multipart",
        ),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", "bad_multipart"),
        (
            b'--b\r\ncontent-disposition: form-data; name="images"\r\n\r\n\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "empty_image",
        ),
    ],
)
async def test_bad_multipart_is_400(start: Start, body: bytes, kind: str, code: str) -> None:
    client = await start()
    answer = await client.post("/predict", content=body, headers={"content-type": kind})
    refusal(answer, code)


async def test_limits_on_body_pixels_and_images(start: Start) -> None:
    client = await start(max_body_bytes=2000, max_pixels=64, max_images=2)
    fits = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert fits.status_code == 200
    answer = await client.post("/predict", content=b"x" * 2001, headers=PNG)
    assert "2000 bytes" in refusal(answer, "body_too_large")
    large = tiny.encode(tiny.flat(0).resize((9, 8)))
    answer = await client.post("/predict", content=large, headers=PNG)
    assert "64" in refusal(answer, "image_too_large")
    answer = await client.post("/predict", files=[("images", tiny.png(0))] * 3)
    assert "at most 2" in refusal(answer, "too_many_images")


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "//", "/healthz", "/schema.json", "/v1"])
async def test_unknown_paths_are_ours_too(start: Start, path: str) -> None:
    client = await start()
    refusal(await client.get(httpx.URL("http://test", raw_path=path.encode())), "not_found")


async def test_wrong_methods_name_the_right_ones(start: Start) -> None:
    client = await start()
    answer = await client.get("/predict")
    refusal(answer, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = await client.delete("/model")
    refusal(answer, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"


class Gate:
    """Holds an engine's calls until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        run = Engine.run_all

        def held(engine: Engine, images: Any, batch: int = 256, *, in_lane: bool = False) -> Scores:
            self.entered.release()
            assert self.open.wait(timeout=30)
            return run(engine, images, batch, in_lane=in_lane)

        monkeypatch.setattr(Engine, "run_all", held)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=30)


async def test_a_full_queue_is_503_and_harms_no_accepted_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(queue=2, threads=1)  # one batch at a time
    gate = Gate(monkeypatch)

    def post() -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(client.post("/predict", content=tiny.png(255), headers=PNG))

    accepted = [post()]
    await gate.wait()
    flood = [post() for _ in range(6)]
    done, waiting = await asyncio.wait(flood, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 4:
        more, waiting = await asyncio.wait(waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    for task in done:
        refusal(task.result(), "queue_full")
        assert task.result().headers["retry-after"] == "1"
    unread = await client.post("/predict", content=b"no image", headers=PNG)
    refusal(unread, "queue_full")  # no work goes into what is refused anyway
    gate.open.set()
    for task in [*accepted, *waiting]:
        assert (await task).json()["predictions"][0]["label"] == "bright"


async def test_a_request_that_takes_too_long_is_504_and_the_next_is_served(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(timeout_s=0.2)
    gate = Gate(monkeypatch)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert "0.2 s" in refusal(answer, "timeout")
    gate.open.set()
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    assert answer.status_code == 200


async def test_a_bug_of_ours_is_500_in_the_same_shape(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()

    def broken(*_: Any, **__: Any) -> Scores:
        raise RuntimeError("internal detail")

    monkeypatch.setattr(Engine, "run_all", broken)
    answer = await client.post("/predict", content=tiny.png(0), headers=PNG)
    message = refusal(answer, "internal_error")
    assert answer.headers["x-request-id"] in message
    assert "internal detail" not in answer.text


async def test_an_answer_that_is_not_a_number_is_500(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    run = Engine.run_all

    def overflowing(*args: Any, **named: Any) -> Scores:
        scores = run(*args, **named)
        return Scores(scores.logits, scores.member_logits * np.float32("inf"))

    monkeypatch.setattr(Engine, "run_all", overflowing)
    answer = await client.post("/predict", content=tiny.png(255), headers=PNG)
    refusal(answer, "internal_error")


async def test_not_ready_before_the_model_is_loaded(gray_model: Path) -> None:
    app = App(Worker(Settings(model=gray_model)), expose="full")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/readyz", "/model", "/report"):
            answer = await client.get(path)
            refusal(answer, "starting")
            assert answer.headers["retry-after"] == "1"
            assert "x-model-sha256" not in answer.headers
        refusal(await client.post("/predict", content=tiny.png(0), headers=PNG), "starting")
        assert (await client.get("/livez")).status_code == 200
        await app.start()
        assert app.worker.loading is not None
        await app.worker.loading
        assert (await client.get("/readyz")).status_code == 200
        await app.stop()
