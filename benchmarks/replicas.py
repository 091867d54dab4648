"""One and two replicas behind the proxy of `deploy/`: throughput, and what reloads and kills cost.

python -m benchmarks.replicas [--seconds 10] [--rounds 3] [--json]

Every replica is `dverge serve` with one worker and one engine thread on the same ONNX file (3
ResNet-20, 32x32 colour, random weights). nginx has the configuration of `deploy/nginx.conf`, and
`wrk` loads it. Replicas, proxy and load share this machine's cores.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench import bar, machine, say
from benchmarks.proxy import NGINX, proxying
from benchmarks.report import busy_percent, finish, turns
from benchmarks.requests import png
from benchmarks.server import Server, result_of, start_wrk, wrk

CONNECTIONS = (16, 64)
EVENT_CONNECTIONS, EVENT_S = 16, 300
HEADERS = {"content-type": "image/png"}
DIRECT, ONE, TWO = "1 replica, no proxy", "1 replica", "2 replicas"
ALONE = "the only worker is killed, no proxy"
RELOAD, WORKER = "rolling reload", "the worker of one is killed"
STOPPED, KILLED = "one is stopped, then started", "one is killed, then started"
BACK_S = 2.0
COLUMNS = ["case", "at_once", "per_s", "p50_ms", "p99_ms", "longest_ms", "answered", "failed"]


@dataclass
class Replicas:
    """Two replicas that serve the same file, as those of `deploy/compose.yaml` do.

    Args:
        folder: with the model files `first.onnx` and `second.onnx`.
        servers: the replicas.
        environment: theirs.
    """

    folder: Path
    servers: list[Server]
    environment: dict[str, str]

    def start(self, server: Server) -> None:
        """Start a replica, and wait until it is ready."""
        server.start(self.environment, self.folder / f"{server.name}.log")

    def reload(self) -> None:
        """Put the other model file in service, one replica after the other."""
        (self.folder / "second.onnx").replace(self.folder / "model.onnx")
        served = {_sha256(server.port) for server in self.servers}
        for server in self.servers:
            url = f"http://127.0.0.1:{server.port}/admin/reload"
            token = {"authorization": f"Bearer {self.environment['DVERGE_ADMIN_TOKEN']}"}
            urllib.request.urlopen(
                urllib.request.Request(url, method="POST", headers=token), timeout=60
            ).close()
        now = {_sha256(server.port) for server in self.servers}
        if len(now) != 1 or now & served:
            raise SystemExit(f"the reload did not change the model: {served}, then {now}")

    def kill_worker(self) -> None:
        """Kill the only worker of the first replica, and wait until there is a new one."""
        _kill_worker(self.servers[0])
        _first_answer(self.servers[0].port)

    def restart(self, number: signal.Signals) -> None:
        """End the first replica with this signal, and start it again a second later."""
        first = self.servers[0]
        assert first.process
        if number == signal.SIGKILL:
            first.signal(number)  # the workers, too
        else:
            first.process.send_signal(number)
        first.process.wait()
        time.sleep(1)
        self.start(first)


def _sha256(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=60) as answer:
        return str(answer.headers["x-model-sha256"])


def _kill_worker(server: Server) -> None:
    assert server.process
    # What serves listens; the supervisor's other child only watches over resources.
    for child in psutil.Process(server.process.pid).children():
        if "worker" in " ".join(child.cmdline()):
            child.kill()


def _first_answer(port: int) -> float:
    """Return how long it takes until a request is answered, by whatever answers first, seconds."""
    begun = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30).close()
            return time.monotonic() - begun
        time.sleep(0.01)


def worker_killed(server: Server, times: int) -> dict[str, Any]:
    """Kill the only worker again and again; return the row with the longest wait for an answer."""
    waits = []
    for _ in range(times):
        _kill_worker(server)
        waits.append(1000 * _first_answer(server.port))
    return {"case": ALONE, "p50_ms": statistics.median(waits), "longest_ms": max(waits)}


def throughput(
    cases: dict[str, int], body: Path, seconds: int, rounds: int
) -> list[dict[str, Any]]:
    """Load each of the cases, names to ports, in turns; return their rows, medians over rounds."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for connections in CONNECTIONS:
            for case, port in cases.items():
                for duration in (1, seconds):
                    result = wrk(port, "/predict", body, HEADERS, connections, duration)
                if result["errors"] or not result["requests"]:
                    raise SystemExit(f"{case}, {connections} at once: {result} in {seconds} s")
                found.setdefault((case, connections), []).append(_row(result))
    return [
        {"case": case, "at_once": connections}
        | {key: statistics.median(each[key] for each in results) for key in results[0]}
        for (case, connections), results in found.items()
    ]


def _row(result: dict[str, float]) -> dict[str, float]:
    return {
        "per_s": result["requests"] / result["seconds"],
        "p50_ms": result["p50_ms"],
        "p99_ms": result["p99_ms"],
        "longest_ms": result["max_ms"],
        "answered": result["requests"],
        "failed": result["errors"],
    }


def during(case: str, event: Callable[[], None], port: int, body: Path) -> dict[str, Any]:
    """Let something happen under load; return the row of that load, a second longer each way."""
    say(case)
    load = start_wrk(port, "/predict", body, HEADERS, EVENT_CONNECTIONS, EVENT_S)
    try:
        time.sleep(1)
        event()
        time.sleep(1)
        if load.poll() is not None:
            raise SystemExit(f"{case}: took longer than {EVENT_S} s")
    finally:
        load.send_signal(signal.SIGINT)
    return {"case": case, "at_once": EVENT_CONNECTIONS, **_row(result_of(load))}


@contextlib.contextmanager
def replicas(folder: Path) -> Iterator[Replicas]:
    """Run two replicas for the length of the block."""
    # In here: torch would keep memory and threads of its own beside the servers.
    from benchmarks.engine import random_ensemble
    from export.graph import build_graph

    ensemble, card = random_ensemble(3)
    for name in ("model", "second"):
        data = build_graph(ensemble, replace(card, form="grouped", name=name))
        (folder / f"{name}.onnx").write_bytes(data)
    serve = ["dverge_serve", "serve", str(folder / "model.onnx"), "--port", "PORT"]
    command = [sys.executable, "-m", *serve, "--device", "cpu"]
    servers = [Server(name, command, "/readyz", png(), HEADERS) for name in ("first", "second")]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DVERGE_")},
        "DVERGE_THREADS": "1",
        "DVERGE_ADMIN_TOKEN": secrets.token_hex(16),
    }
    running = Replicas(folder, servers, environment)
    try:
        for server in servers:
            running.start(server)
        yield running
    finally:
        for server in servers:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()


def measure(folder: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """Run everything and return the report."""
    here = machine() | {"busy_percent": busy_percent()}
    body = folder / "body"
    body.write_bytes(png())
    with replicas(folder) as two, contextlib.ExitStack() as stack:
        ports = [server.port for server in two.servers]
        one_port = stack.enter_context(proxying(ports[:1], folder / "one"))
        two_port = stack.enter_context(proxying(ports, folder / "two"))
        cases = {DIRECT: ports[0], ONE: one_port, TWO: two_port}
        rows = throughput(cases, body, seconds, rounds)
        events: dict[str, Callable[[], None]] = {
            RELOAD: two.reload,
            WORKER: two.kill_worker,
            STOPPED: partial(two.restart, signal.SIGTERM),
            KILLED: partial(two.restart, signal.SIGKILL),
        }
        rows += [during(case, event, two_port, body) for case, event in events.items()]
        rows.append(worker_killed(two.servers[0], 2 + rounds))
    return {"machine": here, "rows": rows, "bars": bars(rows, list(events)), "skipped": []}


def bars(rows: list[dict[str, Any]], events: list[str]) -> list[dict[str, Any]]:
    """Return the bars: nothing fails, whatever happens, and nobody waits long."""
    by_case = {row["case"]: row for row in rows}
    found = [
        bar(f"failed requests, {case}", by_case[case]["failed"], "at most", 0, at_most=True)
        for case in events
    ]
    for case in (WORKER, ALONE):
        seconds = by_case[case]["longest_ms"] / 1000
        found.append(bar(f"longest answer, {case}", seconds, "s, at most", BACK_S, at_most=True))
    return found


def main() -> None:
    """Run the benchmark from the command line."""
    chosen = turns(__doc__, 10, {"wrk": "wrk", NGINX or "nginx": "nginx-light"})
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), chosen.seconds, chosen.rounds)
    finish("replicas", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
