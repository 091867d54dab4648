"""A real `bentoml serve` over real sockets: where it listens, what it shows, whom it tells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import tiny
from tests.serving.server import ROOT, Server, clean_environment, free_port, serving
from tests.serving.tiny import PNG


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


def test_in_a_container_it_listens_on_every_address(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path, BENTOML_CONTAINERIZED="1") as server:
        (worker,) = server.workers()
        sockets = worker.net_connections(kind="inet")
        listening = {found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN}
        assert listening == {"0.0.0.0"}
        answer = httpx.post(f"{server.url}/predict", content=tiny.png(0), headers=PNG)
    assert "disagreement" not in answer.json()["predictions"][0]


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


def test_two_services_do_not_wipe_each_others_counters(server: Server, tmp_path: Path) -> None:
    httpx.post(f"{server.url}/predict", content=tiny.png(255), headers=PNG)
    before = httpx.get(f"{server.url}/metrics").text.count(
        'dverge_predictions_total{label="bright"}'
    )
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path):
        text = httpx.get(f"{server.url}/metrics").text
    assert before == text.count('dverge_predictions_total{label="bright"}') == 1


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
