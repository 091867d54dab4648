"""Two replicas behind the proxy of `deploy/`: whatever happens to one, no request fails."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from benchmarks.proxy import NGINX, proxying
from tests.serving import tiny
from tests.serving.server import Server, bentoml_serve, free_port, wait_until

pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed (Debian: nginx-light)")
ADMIN = {"authorization": "Bearer for-reload"}
CALLERS = 4


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers, each with the same gray model in a folder of its own."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    servers: list[Server] = []
    try:
        for folder in folders:
            tiny.save_gray_model(folder / "model.onnx")
            server = bentoml_serve(folder, free_port(), DVERGE_ADMIN_TOKEN="for-reload")
            servers.append(server)
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.stop()


@pytest.fixture(scope="module")
def proxy(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ports = [server.port for server in replicas]
    with proxying(ports, tmp_path_factory.mktemp("proxy")) as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def load(proxy: str) -> Iterator[list[httpx.Response]]:
    """Ask for predictions all the while; gives the answers."""
    stop = threading.Event()
    answers: list[httpx.Response] = []
    body = tiny.png(255)

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                answers.append(client.post(f"{proxy}/predict", content=body))

    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def more(answers: list[httpx.Response], count: int) -> None:
    before = len(answers)
    wait_until(lambda: len(answers) >= before + count, "no answers")


def test_a_reload_of_one_after_the_other(replicas: list[Server], proxy: str) -> None:
    with load(proxy) as answers:
        more(answers, 20)
        for server in replicas:
            tiny.save_gray_model(server.folder / "model.onnx", labels=("light", "dark"))
            done = httpx.post(f"{server.url}/admin/reload", headers=ADMIN, timeout=60)
            assert done.is_success, done.text
            more(answers, 20)
    assert {answer.status_code for answer in answers} == {200}
    served = [answer.headers["x-model-sha256"] for answer in answers]
    assert len(set(served)) == 2
    assert served[-1] != served[0]


def test_a_killed_replica_takes_no_request_along(replicas: list[Server], proxy: str) -> None:
    """Workers and supervisor at once, as when a machine fails."""
    victim, other = replicas
    with load(proxy) as answers:
        more(answers, 20)
        for process in (victim.process.pid, *(worker.pid for worker in victim.workers())):
            os.kill(process, signal.SIGKILL)
        victim.process.wait()
        more(answers, 100)
    assert {answer.status_code for answer in answers} == {200}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{victim.url}/livez")
    assert httpx.get(f"{other.url}/livez").is_success


class Full(BaseHTTPRequestHandler):
    """A stand-in for a replica: tells who asks with `full` that its queue is full."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(503 if body == b"full" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def test_full_queues_are_told_and_nobody_is_left_out_for_them(tmp_path: Path) -> None:
    """If a refusal counted as a failure both would be left out, and nobody answer."""
    with contextlib.ExitStack() as stack:
        full = [stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Full)) for _ in range(2)]
        for server in full:
            threading.Thread(target=server.serve_forever).start()
            stack.callback(server.shutdown)
        port = stack.enter_context(proxying([server.server_port for server in full], tmp_path))
        for _ in range(5):
            for body, status in ((b"full", 503), (b"room", 200)):
                answer = httpx.post(f"http://127.0.0.1:{port}/predict", content=body)
                assert (answer.status_code, answer.content) == (status, body)
