"""The example clients, each run as its reader would run it, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.serving import tiny
from tests.serving.server import ROOT, Server, clean_environment, free_port, serving

CLIENTS = {"py": [sys.executable], "sh": ["bash"], "mjs": ["node"]}
TOKEN = "s3cret"


@pytest.fixture(params=sorted(CLIENTS))
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command that runs one client."""
    kind = request.param
    needed = {"sh": "curl", "mjs": "node"}.get(kind)
    if needed and not shutil.which(needed):
        pytest.skip(f"{needed} is not installed: examples/predict.{kind} is not run")
    return [*CLIENTS[kind], str(ROOT / "examples" / f"predict.{kind}")]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    tiny.save_gray_model(folder / "model.onnx")
    with serving(folder, DVERGE_TOKEN=TOKEN) as server:
        yield server


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for name, brightness in (("a white one.png", 255), ("black.png", 0), ("gray.png", 102)):
        (tmp_path / name).write_bytes(tiny.png(brightness))
        paths.append(tmp_path / name)
    return paths


def run(
    client: list[str], url: str, paths: list[Path], **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*client, *map(str, paths)],
        env=clean_environment(DVERGE_URL=url, **environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def labels(client: list[str], output: str) -> list[str]:
    lines = output.splitlines()
    if client[0] == "bash":
        return [str(json.loads(line)["predictions"][0]["label"]) for line in lines if line]
    return [line.split("\t")[1] for line in lines]


def test_it_prints_every_answer_in_order(
    client: list[str], server: Server, images: list[Path]
) -> None:
    done = run(client, server.url, images)
    assert (done.returncode, done.stderr) == (0, "")
    assert labels(client, done.stdout) == ["bright", "dark", "bright"]
    if client[0] != "bash":
        assert done.stdout.startswith(f"{images[0]}\tbright\t0.98")


def test_it_tells_what_the_service_refused(
    client: list[str], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no image at all")
    done = run(client, server.url, [tmp_path / "notes.txt"])
    assert done.returncode == 1
    assert "not_an_image" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_it_carries_a_token(client: list[str], guarded: Server, images: list[Path]) -> None:
    refused = run(client, guarded.url, images)
    assert refused.returncode == 1
    assert "unauthorized" in refused.stdout + refused.stderr
    done = run(client, guarded.url, images, DVERGE_TOKEN=TOKEN)
    assert done.returncode == 0
    assert labels(client, done.stdout) == ["bright", "dark", "bright"]


def test_it_says_when_nobody_answers(client: list[str], images: list[Path]) -> None:
    done = run(client, f"http://127.0.0.1:{free_port()}", images[:1])
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_it_waits_while_the_service_is_full(client: list[str], images: list[Path]) -> None:
    full = json.dumps({"error": {"code": "queue_full", "message": "retry later"}})
    found = json.dumps({"predictions": [{"label": "bright", "index": 0}]})
    answers = [(503, full), (503, "<h1>a proxy's own page</h1>"), (200, found)]

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status, text = answers.pop(0)
            body = text.encode()
            self.send_response(status)
            self.send_header("retry-after", "0")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as busy:
        thread = threading.Thread(target=busy.serve_forever)
        thread.start()
        done = run(client, f"http://127.0.0.1:{busy.server_port}", images[:1])
        busy.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    assert answers == []
    assert labels(client, done.stdout) == ["bright"]


def test_the_page_about_clients_shows_these_very_files() -> None:
    page = (ROOT / "docs" / "clients.md").read_text()
    for kind in CLIENTS:
        assert (ROOT / "examples" / f"predict.{kind}").read_text() in page, kind
