"""A real `bentoml serve` over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import onnx
import psutil
import pytest

from tests.service import tiny
from tests.service.figures import tell
from tests.service.server import (
    ROOT,
    Server,
    bentoml_serve,
    clean_environment,
    free_port,
    serving,
)

PNG = {"content-type": "image/png"}


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


def head(path: str = "/predict", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: test", "content-type: image/png"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status and all bytes of an answer that ends with the connection."""
    data = b""
    while block := connection.recv(65536):
        data += block
    match = re.match(rb"HTTP/1\.1 (\d+)", data)
    assert match, data
    return int(match[1]), data


def test_a_curl_away_from_an_answer(server: Server) -> None:
    (server.folder / "digit.png").write_bytes(tiny.png(255))
    command = ["curl", "-s", "--data-binary", "@digit.png", "-H", "content-type: image/png"]
    output = subprocess.check_output([*command, f"{server.url}/predict"], cwd=server.folder)
    assert b'"label":"bright"' in output


def test_it_listens_on_loopback_alone(server: Server) -> None:
    listening = {
        found.laddr.ip
        for process in [psutil.Process(server.process.pid), *server.workers()]
        for found in process.net_connections(kind="inet")
        if found.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    answer = httpx.post(f"{server.url}/predict", content=tiny.png(0), headers=PNG)
    assert "disagreement" in answer.json()["predictions"][0]  # full, as befits loopback


def test_beyond_loopback_it_warns_and_shows_less(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, "--host", "0.0.0.0") as server:
        answer = httpx.post(f"{server.url}/predict", content=tiny.png(0), headers=PNG)
        prediction = answer.json()["predictions"][0]
    assert "probability" in prediction
    assert "disagreement" not in prediction
    assert "DVERGE_TOKEN" in server.log


@pytest.mark.parametrize("path", ["/healthz", "/schema.json", "/static_content/index.css", "/x"])
def test_none_of_bentomls_own_routes_is_left(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_its_pages_and_metrics_are_ours(server: Server) -> None:
    page = httpx.get(server.url)
    assert "swagger" not in page.text.lower()
    assert "content-security-policy" in page.headers
    assert "bentoml" not in httpx.get(f"{server.url}/metrics").text
    document = httpx.get(f"{server.url}/docs.json").json()
    assert set(document["paths"]) >= {"/predict", "/model", "/report", "/metrics"}


def test_no_torch_in_the_serving_process(server: Server) -> None:
    for worker in server.workers():
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "onnxruntime" in maps
        assert "torch" not in maps


def test_onnxruntime_keeps_no_device_id(tmp_path: Path) -> None:
    """Its telemetry leaves one in the home folder as soon as it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, HOME=str(home)) as server:
        assert httpx.post(f"{server.url}/predict", content=tiny.png(0)).status_code == 200
    assert not list(home.rglob("deviceid"))


def test_nobody_is_told_that_it_runs(server: Server) -> None:
    for process in [psutil.Process(server.process.pid), *server.workers()]:
        remote = [found for found in process.net_connections(kind="inet") if found.raddr]
        assert all(found.raddr.ip == "127.0.0.1" for found in remote)
    for worker in server.workers():
        assert worker.environ()["BENTOML_DO_NOT_TRACK"] == "True"


# -- bodies -----------------------------------------------------------------------------------


def test_a_declared_large_body_is_refused_unread(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(
            head(content_length=str(10**12), authorization="Bearer secret") + b"x" * 1000
        )
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 413
    assert b"body_too_large" in data
    assert b"connection: close" in data


def test_a_chunked_large_body_is_refused_before_it_ends(strict: Server) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(transfer_encoding="chunked", authorization="Bearer secret"))
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        # Never ends by itself: only the answer stops it.
        while sent < 100_000_000:
            connection.sendall(chunk)
            sent += 10_000
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if connection.recv(1, socket.MSG_PEEK):
                    break
            connection.settimeout(20)
        connection.settimeout(20)
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 413
    assert b"body_too_large" in data
    assert sent < 100_000_000


def test_a_client_that_sends_all_first_still_reads_its_413(strict: Server) -> None:
    answer = httpx.post(
        f"{strict.url}/predict",
        content=b"x" * 3_000_000,
        headers={**PNG, "authorization": "Bearer secret"},
    )
    assert answer.status_code == 413


def test_a_body_that_stalls_is_408(strict: Server) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(content_length="1000", authorization="Bearer secret") + b"x")
        status, data = read_answer(connection)
    assert status == 408
    assert b"body_timeout" in data
    assert 1 <= time.monotonic() - begun < 10


def test_without_the_token_a_body_is_not_even_read(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head(content_length="90000") + b"x")
        connection.shutdown(socket.SHUT_WR)
        status, data = read_answer(connection)
    assert status == 401
    assert b"unauthorized" in data


def test_what_is_not_http_is_turned_away(strict: Server) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(b"\x16\x03\x01 this is not http\r\n\r\n")
        status, _ = read_answer(connection)
    assert status == 400
    assert httpx.get(f"{strict.url}/livez").status_code == 200


# -- several workers --------------------------------------------------------------------------


def test_metrics_sum_over_the_workers(strict: Server) -> None:
    assert len(strict.workers()) == 2
    headers = {**PNG, "authorization": "Bearer secret"}
    before = _predictions(strict)
    for _ in range(40):  # a connection each: the kernel spreads them over both workers
        assert httpx.post(f"{strict.url}/predict", content=tiny.png(0), headers=headers)
    assert _predictions(strict) == before + 40


def _predictions(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": "Bearer secret"}).text
    found = re.search(r'dverge_predictions_total{label="dark"} (\S+)', text)
    return float(found[1]) if found else 0.0


def test_json_logs_are_json_and_carry_the_request_id(strict: Server) -> None:
    httpx.get(f"{strict.url}/nothing", headers={"x-request-id": "find-me"})
    deadline = time.monotonic() + 10
    while "find-me" not in strict.log:
        assert time.monotonic() < deadline, strict.log
        time.sleep(0.05)
    lines = [line for line in strict.log.splitlines() if "[cli]" not in line]
    ours = [json.loads(line) for line in lines if line.startswith("{")]
    assert any(line.get("request_id") == "find-me" and line["status"] == "401" for line in ours)
    assert any("serves tiny" in line["message"] for line in ours)


# -- life and death ---------------------------------------------------------------------------


def test_sigterm_finishes_what_was_begun(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    body = tiny.png(255)
    with serving(tmp_path) as server:
        address = ("127.0.0.1", server.port)
        with (
            socket.create_connection(address, timeout=30) as connection,
            socket.create_connection(address, timeout=30) as idle,
        ):
            connection.sendall(head(content_length=str(len(body))) + body[:10])
            idle.sendall(b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n")
            while b"alive" not in idle.recv(65536):
                pass
            server.process.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""  # closed: the worker is ending
            connection.sendall(body[10:])
            status, data = read_answer(connection)
        assert status == 200
        assert b"bright" in data
        assert server.stop() == 0


def test_ctrl_c_ends_it_quickly_and_quietly(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path) as server:
        for process in [psutil.Process(server.process.pid), *server.workers()]:
            process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 0
    assert "Traceback" not in server.log


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, TMPDIR=str(temporary)):
        assert list(temporary.glob("dverge-*/metrics/*.db"))
    assert list(temporary.glob("dverge-*")) == []


def test_two_services_do_not_wipe_each_others_counters(server: Server, tmp_path: Path) -> None:
    httpx.post(f"{server.url}/predict", content=tiny.png(255), headers=PNG)
    before = httpx.get(f"{server.url}/metrics").text.count(
        'dverge_predictions_total{label="bright"}'
    )
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path):
        text = httpx.get(f"{server.url}/metrics").text
    assert before == text.count('dverge_predictions_total{label="bright"}') == 1


def _truncate(model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-200])


def _newer(model: Path) -> None:
    tiny.save_gray_model(model, schema_version=99)


def _foreign(model: Path) -> None:
    loaded = onnx.load(model)
    del loaded.metadata_props[:]
    onnx.save(loaded, model)


@pytest.mark.parametrize(
    ("spoil", "settings", "words"),
    [
        (Path.unlink, {}, "no model at"),
        (_truncate, {}, "cannot be loaded"),
        (lambda model: model.write_bytes(b""), {}, "cannot be loaded"),
        (_newer, {}, "schema version 99"),
        (_foreign, {}, "no 'dverge' metadata"),
        (lambda _: None, {"DVERGE_MODEL_SHA256": "0" * 64}, "as pinned"),
        (lambda _: None, {"DVERGE_QUEUE": "many"}, "DVERGE_QUEUE"),
        (lambda _: None, {"DVERGE_WORKERS": "none"}, "DVERGE_WORKERS"),
        (lambda _: None, {"DVERGE_DEVICE": "abacus"}, "DVERGE_DEVICE"),
        pytest.param(
            *(lambda _: None, {"DVERGE_DEVICE": "cuda"}, "no NVIDIA GPU"),
            marks=pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_served_is_one_line_and_exit_2(
    tmp_path: Path, spoil: object, settings: dict[str, str], words: str
) -> None:
    model = tmp_path / "model.onnx"
    tiny.save_gray_model(model)
    assert callable(spoil)
    spoil(model)
    server = bentoml_serve(tmp_path, free_port(), **settings)
    assert server.process.wait(timeout=60) == 2
    lines = server.log.splitlines()
    assert len(lines) == 1, server.log
    assert lines[0].startswith("dverge: ")
    assert words in lines[0]


def test_a_model_that_fails_only_in_the_worker_ends_the_server(tmp_path: Path) -> None:
    """The workers' copy is spoilt between the supervisor's look and the worker's."""
    tiny.save_gray_model(tmp_path / "model.onnx")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = bentoml_serve(tmp_path, free_port(), TMPDIR=str(temporary))
    try:
        _wait_until(lambda: bool(list(temporary.glob("dverge-*/state.json"))), "no copy")
        (copy,) = temporary.glob("dverge-*/0.onnx")
        copy.write_bytes(b"rubbish")
        assert server.process.wait(timeout=60) == 2
    finally:
        server.stop()
    assert "cannot serve" in server.log
    assert "Traceback" not in server.log
    assert list(temporary.glob("dverge-*")) == []


@pytest.mark.parametrize("command", ["bentoml", "dverge"])
def test_a_port_in_use_is_one_line_and_exit_2(tmp_path: Path, command: str) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        shutil.copy(ROOT / "bentofile.yaml", tmp_path)
        module = "bentoml" if command == "bentoml" else "dverge_serve"
        done = subprocess.run(
            [sys.executable, "-m", module, "serve", "--port", port],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"port {port} is in use" in done.stderr


def test_a_built_bento_answers_the_same_from_anywhere(server: Server, tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for name in ("model.onnx", "model.report.json"):
        shutil.copy(server.folder / name, project)
    shutil.copy(ROOT / "bentofile.yaml", project)
    environment = clean_environment(
        BENTOML_HOME=str(tmp_path / "home"), BENTOML_DO_NOT_TRACK="True"
    )
    build = [sys.executable, "-m", "bentoml", "build"]
    subprocess.run(build, cwd=project, env=environment, check=True, capture_output=True)
    port = free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "dverge:latest", "--port", str(port)]
    shutil.rmtree(project)
    bento = Server(elsewhere, command, port, environment)
    try:
        bento.wait_until_ready()
        answers = [
            httpx.post(f"{url}/predict", content=tiny.png(102)).json()
            for url in (bento.url, server.url)
        ]
        assert answers[0] == answers[1]
        assert "suspicious" in answers[0]["predictions"][0]  # its report is inside, too
    finally:
        assert bento.stop() == 0


def test_in_a_container_it_listens_on_every_address(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, BENTOML_CONTAINERIZED="1") as server:
        (worker,) = server.workers()
        sockets = worker.net_connections(kind="inet")
        listening = {found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN}
        assert listening == {"0.0.0.0"}
        answer = httpx.post(f"{server.url}/predict", content=tiny.png(0), headers=PNG)
    assert "disagreement" not in answer.json()["predictions"][0]


def test_dverge_serve_serves_the_same(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "other.onnx")
    port = free_port()
    command = [sys.executable, "-m", "dverge_serve", "serve", "other.onnx"]
    command += ["--host", "localhost", "--port", str(port), "--workers", "2", "--token", "abc"]
    server = Server(tmp_path, command, port, clean_environment())
    try:
        server.wait_until_ready()
        assert httpx.get(f"{server.url}/model").status_code == 401
        card = httpx.get(f"{server.url}/model", headers={"authorization": "Bearer abc"}).json()
        assert card["name"] == "tiny"
        assert len(server.workers()) == 2
        assert "abc" not in " ".join(psutil.Process(server.process.pid).cmdline())
    finally:
        assert server.stop() == 0


def test_workers_end_with_a_killed_supervisor_and_free_the_port(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with serving(tmp_path, DVERGE_WORKERS="2", TMPDIR=str(temporary)) as server:
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        server.process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
        assert len(gone) == 2
    assert list(temporary.glob("dverge-*")) == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", server.port))


def kill_under_load(folder: Path, kills: int, callers: int = 4) -> tuple[int, int]:
    """Kill -9 a worker of two again and again; return how many requests were answered and lost.

    Each time the other one goes on and a new one comes; only what was in flight may be lost.
    """
    tiny.save_gray_model(folder / "model.onnx")
    body = tiny.png(255)
    stop = threading.Event()
    answered: list[int] = []
    failed: list[str] = []
    with serving(folder, DVERGE_WORKERS="2") as server:

        def ask() -> None:
            with httpx.Client(timeout=30) as client:
                while not stop.is_set():
                    try:
                        answer = client.post(f"{server.url}/predict", content=body)
                        answered.append(answer.status_code)
                    except httpx.TransportError as error:
                        failed.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(callers)]
        for thread in threads:
            thread.start()
        try:
            _wait_until(lambda: len(answered) > 50, "no answers")
            for kill in range(kills):
                (victim, other), before = server.workers(), len(answered)
                victim.kill()
                _wait_until(lambda b=before: len(answered) > b + 200, "nobody goes on")  # type: ignore[misc]
                _wait_until(
                    lambda v=victim: len(server.workers()) == 2 and v not in server.workers(),  # type: ignore[misc]
                    "no new worker",
                )
                assert other in server.workers()
                # At most the one request that each had in flight, at each kill.
                assert len(failed) <= callers * (kill + 1)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert set(answered) == {200}
    return len(answered), len(failed)


def test_a_killed_worker_takes_only_its_own_requests_and_comes_back(tmp_path: Path) -> None:
    kill_under_load(tmp_path, kills=1)


@pytest.mark.long
def test_workers_killed_again_and_again(tmp_path: Path) -> None:
    kills = int(os.environ.get("KILLS", "30"))
    answered, lost = kill_under_load(tmp_path, kills)
    figures = f"{answered} answers, all right; {lost} requests lost, each in flight at a kill"
    tell(f"{kills} times kill -9 of a worker of two, 4 callers", figures, "killed")


def _wait_until(true: Callable[[], bool], otherwise: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
