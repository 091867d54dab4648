"""How a server ends: when asked to, and before it has served anything."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import onnx
import psutil
import pytest

from dverge_serve.engine.report import report_path
from dverge_serve.errors import UserError
from dverge_serve.serving.settings import Settings
from dverge_serve.serving.worker import Worker
from tests.serving import tiny
from tests.serving.server import (
    ROOT,
    bentoml_serve,
    clean_environment,
    free_port,
    serving,
    wait_until,
)
from tests.serving.wire import head, read_answer


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


@pytest.mark.usefixtures("with_a_terminal")
def test_a_closed_terminal_ends_it_as_ctrl_c_does(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path) as server:
        for process in [psutil.Process(server.process.pid), *server.workers()]:
            process.send_signal(signal.SIGHUP)
        assert server.process.wait(timeout=60) == 0
    assert "Traceback" not in server.log
    assert server.log.count(" is ready after ") == 1


def test_under_nohup_it_stays(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serving(tmp_path) as server:
            workers = server.workers()
            for process in [psutil.Process(server.process.pid), *workers]:
                process.send_signal(signal.SIGHUP)
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert server.workers() == workers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, TMPDIR=str(temporary)):
        assert list(temporary.glob("dverge-*/metrics/*.db"))
    assert list(temporary.glob("dverge-*")) == []


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
        (lambda model: report_path(model).write_bytes(b"{"), {}, "cannot use the report"),
        (lambda _: None, {"DVERGE_TOKEN": ""}, "DVERGE_TOKEN is empty"),
        (
            lambda _: None,
            {"DVERGE_MODEL_SHA256": "0" * 64},
            "change DVERGE_MODEL_SHA256",
        ),
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


@pytest.mark.anyio
async def test_a_load_that_fails_unforeseen_is_told_and_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU out of memory, say: without this the worker would be starting for ever."""

    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    tiny.save_gray_model(tmp_path / "model.onnx")
    monkeypatch.setattr("dverge_serve.serving.reload.Reloader.load_current", fail)
    told: list[UserError] = []
    worker = Worker(Settings(model=tmp_path / "model.onnx"), on_failure=told.append)
    await worker.start()
    await worker.stop()
    assert ["RuntimeError: out of memory" in str(error) for error in told] == [True]


def test_a_model_that_fails_only_in_the_worker_ends_the_server(tmp_path: Path) -> None:
    """The workers' copy is spoilt between the supervisor's look and the worker's."""
    tiny.save_gray_model(tmp_path / "model.onnx")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = bentoml_serve(tmp_path, free_port(), TMPDIR=str(temporary))
    try:
        wait_until(lambda: bool(list(temporary.glob("dverge-*/state.json"))), "no copy")
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
