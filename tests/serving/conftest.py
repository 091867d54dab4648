from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from dverge_serve.serving.app import App
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.worker import Worker
from tests.serving import tiny
from tests.serving.server import Server, serving

Start = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def with_a_terminal() -> Iterator[None]:
    """A process that a closed terminal would end, even where `nohup` runs these tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def gray_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gray model with a report about it."""
    path = tmp_path_factory.mktemp("gray") / "model.onnx"
    tiny.save_report(path, tiny.save_gray_model(path))
    return path


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("colour") / "model.onnx"
    tiny.save_colour_model(path)
    return path


@pytest.fixture
async def start(gray_model: Path) -> AsyncIterator[Start]:
    """Start applications in this process; returns a client of each."""
    async with AsyncExitStack() as stack:

        async def start_one(*, expose: Any = "full", **settings: Any) -> httpx.AsyncClient:
            app = App(Worker(Settings(**{"model": gray_model, **settings})), expose=expose)
            await app.start()
            assert app.worker.loading is not None
            await app.worker.loading
            stack.push_async_callback(app.stop)
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            return await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://test")
            )

        yield start_one


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One `bentoml serve` for the session, with the gray model and its report."""
    folder = tmp_path_factory.mktemp("server")
    tiny.save_report(folder / "model.onnx", tiny.save_gray_model(folder / "model.onnx"))
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits and a token, two workers, JSON logs."""
    folder = tmp_path_factory.mktemp("strict")
    tiny.save_gray_model(folder / "model.onnx")
    with serving(
        folder,
        DVERGE_MAX_BODY_BYTES="100000",
        DVERGE_TIMEOUT_S="1",
        DVERGE_TOKEN="secret",
        DVERGE_WORKERS="2",
        DVERGE_LOG="json",
    ) as running:
        yield running
