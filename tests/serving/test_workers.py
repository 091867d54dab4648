"""Several workers: counters that add up, one log, and kills that cost only what was in flight."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import tiny
from tests.serving.figures import tell
from tests.serving.server import Server, serving, starting, wait_until
from tests.serving.tiny import PNG


def test_metrics_sum_over_the_workers(strict: Server) -> None:
    assert len(strict.workers()) == 2
    headers = {**PNG, "authorization": "Bearer secret"}
    before = _predictions(strict)
    for _ in range(40):  # a connection each: the kernel spreads them over both workers
        answer = httpx.post(f"{strict.url}/predict", content=tiny.png(0), headers=headers)
        assert answer.status_code == 200
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
    ours = [json.loads(line) for line in strict.log.splitlines()]
    assert any(line.get("request_id") == "find-me" and line["status"] == "401" for line in ours)
    assert any("serves tiny" in line["message"] for line in ours)


@pytest.mark.parametrize("ready", [True, False])
def test_workers_end_with_a_killed_supervisor_and_free_the_port(
    ready: bool, tmp_path: Path
) -> None:
    """Ready or not: a worker that still loads the model makes no new folder."""
    tiny.save_gray_model(tmp_path / "model.onnx")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    start = serving if ready else starting
    with start(tmp_path, DVERGE_WORKERS="2", TMPDIR=str(temporary)) as server:
        wait_until(lambda: len(server.workers()) == 2, server.log)
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
        assert len(gone) == 2
    assert list(temporary.glob("dverge-*")) == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", server.port))


def test_the_only_worker_killed_is_replaced_at_once(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path) as server:
        (victim,) = server.workers()
        victim.kill()
        killed = time.time()
        # Nobody listens now, so this waits in the socket's queue.
        assert httpx.post(f"{server.url}/predict", content=tiny.png(255), timeout=30).is_success
        (new,) = server.workers()
        assert new.create_time() - killed < 1
        # On an idle machine this is how long it takes; on a busy one the clock says little.
        assert new.cpu_times().user + new.cpu_times().system < 4


def test_no_file_descriptors_left_is_one_line_and_passes(tmp_path: Path) -> None:
    tiny.save_gray_model(tmp_path / "model.onnx")
    with serving(tmp_path) as server:
        (worker,) = server.workers()
        address = "127.0.0.1", server.port
        most = worker.rlimit(psutil.RLIMIT_NOFILE)[1]
        worker.rlimit(psutil.RLIMIT_NOFILE, (worker.num_fds() + 8, most))
        callers = [socket.create_connection(address, timeout=20) for _ in range(40)]
        wait_until(lambda: "Too many open files" in server.log, "nothing told")
        time.sleep(1)
        for caller in callers:
            caller.close()
        assert httpx.get(f"{server.url}/livez", timeout=20).status_code == 200
    assert server.log.count("Too many open files") <= 3
    assert "Traceback" not in server.log


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
            wait_until(lambda: len(answered) > 50, "no answers")
            for kill in range(kills):
                (victim, other), before = server.workers(), len(answered)
                victim.kill()
                wait_until(lambda b=before: len(answered) > b + 200, "nobody goes on")  # type: ignore[misc]
                wait_until(
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
