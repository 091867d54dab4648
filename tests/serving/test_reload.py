"""Reload without downtime: all workers or none, and no request fails meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from dverge_serve.serving.reload import READY, ModelVersions, State
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.worker import Worker
from tests.serving import tiny
from tests.serving.conftest import Start
from tests.serving.server import Server, serving

TOKEN = {"authorization": "Bearer secret"}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Server]:
    """A server of two workers and a token."""
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, DVERGE_WORKERS="2", DVERGE_TOKEN="secret") as running:
        yield running


def put(server: Server, write: Callable[[Path], object]) -> None:
    """Put a new model file in place atomically."""
    new = server.folder / "new.onnx"
    write(new)
    new.replace(server.folder / "model.onnx")


def reload(server: Server) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/reload", headers=TOKEN, timeout=60)


def shas(server: Server, count: int = 40) -> set[str]:
    """Return the model hashes that fresh connections meet, which the kernel spreads."""
    found = set()
    for _ in range(count):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/livez")
        found.add(connection.getresponse().headers["x-model-sha256"])
        connection.close()
    return found


class Load:
    """Requests from several threads, all of which must be answered rightly."""

    def __init__(self, server: Server) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.labels: set[str] = set()
        self._server, self._stop = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        body = tiny.png(255)
        with httpx.Client(timeout=30, headers=TOKEN) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{self._server.url}/predict", content=body)
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                    else:
                        value = answer.json()
                        self.labels.add(value["predictions"][0]["label"])
                        # A request is answered by one model from beginning to end.
                        if value["model"]["sha256"] != answer.headers["x-model-sha256"]:
                            self.failures.append("two models in one answer")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.count += 1


def test_every_worker_swaps_and_no_request_fails(pair: Server) -> None:
    before = shas(pair)
    assert len(before) == 1
    with Load(pair) as load:
        for round_number in range(3):
            labels = (f"bright {round_number}", "dark")
            put(pair, partial(tiny.save_gray_model, labels=labels))
            answer = reload(pair)
            assert answer.status_code == 200, answer.text
            assert answer.json()["workers"] == 2
            assert shas(pair) == {answer.json()["sha256"]} != before
            before = shas(pair)
            count = load.count
            while load.count < count + 20:
                assert all(thread.is_alive() for thread in load._threads)
    assert load.failures == []
    assert load.labels >= {"bright 0", "bright 1", "bright 2"}


def test_its_report_comes_with_it(pair: Server) -> None:
    url = f"{pair.url}/report"
    assert httpx.get(url, headers=TOKEN).status_code == 404
    digest = tiny.save_gray_model(pair.folder / "model.onnx")
    tiny.save_report(pair.folder / "model.onnx", digest)
    assert reload(pair).status_code == 200
    assert {httpx.get(url, headers=TOKEN).status_code for _ in range(20)} == {200}
    put(pair, lambda path: tiny.save_gray_model(path, ("other", "dark")))
    assert reload(pair).status_code == 200  # the old report is not about this file
    assert {httpx.get(url, headers=TOKEN).status_code for _ in range(20)} == {404}


def test_a_bad_file_is_refused_and_the_old_goes_on(pair: Server) -> None:
    before = shas(pair)
    bad: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: path.write_bytes(b"rubbish"), "cannot be loaded"),
        (lambda path: tiny.save_gray_model(path, schema_version=99), "schema version 99"),
    ]
    with Load(pair) as load:
        for write, words in bad:
            put(pair, write)
            answer = reload(pair)
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "reload_refused"
            assert words in answer.json()["error"]["message"]
            assert "model.onnx" in answer.json()["error"]["message"]
            assert shas(pair) == before
        (pair.folder / "model.onnx").unlink()
        assert reload(pair).status_code == 409
        assert shas(pair) == before
        put(pair, lambda path: tiny.save_gray_model(path, ("fine", "again")))
        assert reload(pair).status_code == 200
    assert load.failures == []
    assert "fine" in load.labels


def test_a_worker_started_anew_serves_what_the_others_serve(pair: Server) -> None:
    put(pair, lambda path: tiny.save_gray_model(path, ("second", "dark")))
    assert reload(pair).status_code == 200
    current = shas(pair)
    (pair.folder / "model.onnx").write_bytes(b"not yet reloaded, and rubbish")
    victim = pair.workers()[0]
    victim.kill()
    end = time.monotonic() + 120
    while victim in pair.workers() or pair.log.count(" is ready after ") < 3:
        assert pair.process.poll() is None
        assert time.monotonic() < end, pair.log
        time.sleep(0.05)
    assert shas(pair) == current


@pytest.mark.anyio
async def test_reload_exists_only_with_a_token(start: Start) -> None:
    assert (await (await start()).post("/admin/reload")).status_code == 404
    client = await start(token="secret")
    assert (await client.post("/admin/reload")).status_code == 401
    wrong = await client.get("/admin/reload", headers=TOKEN)
    assert wrong.status_code == 405
    assert (await client.post("/admin/reload", headers=TOKEN)).status_code == 200
    described = (await client.get("/openapi.json")).json()["paths"]
    assert "/admin/reload" in described


@pytest.mark.anyio
async def test_no_number_is_given_twice_and_the_same_file_counts_once(
    start: Start, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    tiny.save_gray_model(model)
    client = await start(token="secret", model=model)
    numbers = []
    for data in (b"rubbish", model.read_bytes(), model.read_bytes()):
        (tmp_path / "new.onnx").write_bytes(data)
        (tmp_path / "new.onnx").replace(model)
        answer = await client.post("/admin/reload", headers=TOKEN)
        numbers.append(answer.json().get("generation"))
    assert numbers == [None, 2, 3]
    lines = (await client.get("/metrics", headers=TOKEN)).text.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("dverge_model_info{")] == ["1.0"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.anyio
async def test_a_reload_whose_caller_died_and_one_that_was_missed_do_no_harm(
    tmp_path: Path,
) -> None:
    model = tmp_path / "model.onnx"
    first = tiny.save_gray_model(model)
    worker = Worker(Settings(model=model), folder=tmp_path / "shared")
    await worker.start()
    versions = ModelVersions(tmp_path / "shared")
    assert worker.loading is not None
    await worker.loading
    # Another worker began a reload, and died of it.
    tiny.save_gray_model(versions.path(1), ("withdrawn", "dark"))
    versions.write_state(State(current=0, next=1, last=1))
    await until(lambda: versions.read_note(1, READY, os.getpid()) is not None)
    assert worker.model().sha256 == first
    second = tiny.save_gray_model(model, ("second", "dark"))
    assert await worker.reload() == {
        "sha256": second,
        "previous_sha256": first,
        "report": "missing",
        "alarm": False,
        "generation": 2,
        "workers": 1,
    }
    # Others went on while this one did not look.
    third = tiny.save_gray_model(versions.path(3), ("third", "dark"))
    versions.write_state(State(current=3, last=3))
    await until(lambda: worker.model().sha256 == third)
    await worker.stop()


@pytest.mark.anyio
async def test_a_pinned_file_stays(start: Start, tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    pinned = tiny.save_gray_model(model)
    client = await start(token="secret", model=model, model_sha256=pinned)
    new = tmp_path / "new.onnx"
    tiny.save_gray_model(new, ("other", "dark"))
    new.replace(model)
    answer = await client.post("/admin/reload", headers=TOKEN)
    assert answer.status_code == 409
    assert "as pinned" in answer.json()["error"]["message"]
    assert (await client.get("/livez")).headers["x-model-sha256"] == pinned
