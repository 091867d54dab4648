"""The benchmark of the service: peers that do the same work, constant arrivals, honest bars."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import uvloop

from benchmarks import overload, serving
from benchmarks import report as report_module
from benchmarks import server as server_module
from benchmarks.overload import LOST, OK, REFUSED, Ask
from benchmarks.peers.peer import FASTAPI, PEERS, Peer, absent
from benchmarks.requests import png
from dverge_serve.engine.session import Engine
from tests.serving.tiny import save_linear_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "model.onnx"
    weights = np.random.default_rng(0).normal(0, 0.02, (2, 3, 3, 32, 32)).astype(np.float32)
    save_linear_model(path, weights, np.zeros((2, 3), np.float32), ("a", "b", "c"))
    return path


@pytest.mark.parametrize("name", PEERS)
def test_peers_classify_the_picture_as_the_engine_does(name: str, model: Path) -> None:
    if why := absent([name]):
        pytest.skip(why[name])
    server = serving.servers_for(model, [name])[-1]
    # Ray puts sockets in there, whose paths must be short.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            server.start(serving.environment_for(model, Path(folder)), Path(folder) / "log")
            url = f"http://127.0.0.1:{server.port}/predict"
            request = urllib.request.Request(url, server.body, server.headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = json.loads(answer.read())
        finally:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()
    with Engine(model, device="cpu", threads=1) as engine:
        expected = engine.predict([png()])[0]
    (got,) = found if isinstance(found, list) else [found]
    assert (got["label"], got["index"]) == (expected.label, expected.index)
    assert got["probability"] == pytest.approx(expected.probability, abs=1e-5)


def test_a_peer_that_is_not_installed_is_left_out_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PEERS, "other", Peer(("json", "no_such_package"), ()))
    assert absent(["other"]) == {"other": "no_such_package not installed"}
    assert absent(["bentoml"]) == {}


class Fake(asyncio.Protocol):
    """A server's end of a connection; `answer` gets it whenever a request comes."""

    def __init__(self, answer: Callable[[Fake], None]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._answer(self)


def offered(answer: Callable[[Fake], None], rate: float, seconds: float) -> list[Ask]:
    """Return what comes of requests to a server that answers so."""

    async def run() -> list[Ask]:
        loop = asyncio.get_running_loop()
        async with await loop.create_server(lambda: Fake(answer), overload.HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await overload.offer(port, b"POST / HTTP/1.1\r\n\r\n", rate, seconds)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def test_requests_go_on_while_none_is_answered() -> None:
    """An open loop: the third is sent although the first two have no answer yet."""
    waiting: list[Fake] = []

    def answer(caller: Fake) -> None:
        waiting.append(caller)
        if len(waiting) == 3:
            for each, status in zip(waiting, (b"200 OK", b"503 Busy"), strict=False):
                each.transport.write(b"HTTP/1.1 %s\r\ncontent-length: 2\r\n\r\nok" % status)
            for each in waiting:
                each.transport.close()

    asks = offered(answer, rate=30, seconds=0.1)
    assert sorted(ask.status for ask in asks) == [LOST, OK, REFUSED]
    assert [ask.due - asks[0].due for ask in asks] == pytest.approx([0, 1 / 30, 2 / 30])
    assert all(ask.due <= ask.sent <= ask.answered for ask in asks)


def test_connections_are_kept_for_later_requests() -> None:
    seen: list[Fake] = []

    def answer(caller: Fake) -> None:
        seen.append(caller)
        caller.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    asks = offered(answer, rate=50, seconds=0.2)
    assert [ask.status for ask in asks] == [OK] * 10
    assert len(seen) == 10
    assert len(set(seen)) < 10


def test_the_figures_of_an_overload() -> None:
    """A lead that does not count, then 4 requests in 2 s: 2 answered, 1 refused, 1 lost.

    Of the answers within these 2 s one is to a request of the lead, and one comes too late.
    """
    lead = [Ask(0.0, 0.0, 9.0, REFUSED), Ask(0.5, 0.5, 1.2, OK)]
    counted = [
        Ask(1.0, 1.0, 1.1, OK),
        Ask(1.5, 1.6, 1.7, REFUSED),
        Ask(2.0, 2.0, 2.0, LOST),
        Ask(2.5, 2.5, 2.8, OK),
    ]
    assert overload.row(lead + counted, seconds=2) == pytest.approx(
        {
            "per_s": 1,
            "p50_ms": 200,
            "p99_ms": 298,
            "offered_per_s": 2,
            "refused_share": 0.25,
            "refused_p50_ms": 200,  # from when it was due, not from when it was sent
            "refused_p99_ms": 200,
            "failed_share": 0.25,
        }
    )


def samples(peer: float) -> serving.Samples:
    """Return a run in which a peer has `peer` times our throughput and 1 / `peer` of our times.

    In its second round the machine is half as fast, in its third three times.
    """
    found: dict[serving.Which, dict[str, float]] = {}
    for connections in serving.SINGLES:
        for name, factor in ((serving.OURS, 1.0), (FASTAPI, peer)):
            here = {"per_s": 800 * factor, "p50_ms": 3 / factor, "p99_ms": 30 / factor}
            found[name, f"1 image, {connections} at once"] = here
    found["bare engine", "batch of 1"] = {"per_s": 1000.0, "p50_ms": 1.0}
    found["bare engine", "batch of 32"] = {"per_s": 1000.0, "p50_ms": 32.0}
    found[serving.OURS, "32 images, 4 at once"] = {"per_s": 940}
    full = {"per_s": 760.0, "p99_ms": 700.0, "offered_per_s": 1590.0, "failed_share": 0.0}
    default, short = overload.CASES
    found[serving.OURS, default] = full | {"refused_p99_ms": 20}
    found[serving.OURS, short] = full | {"refused_p99_ms": 49, "p99_ms": 59}
    return {
        which: [
            {
                key: value * (speed if key in ("per_s", "offered_per_s") else 1 / speed)
                for key, value in row.items()
            }
            for speed in (1, 0.5, 3)
        ]
        for which, row in found.items()
    }


def test_the_bars_hold_where_we_are_ahead_and_not_where_we_are_behind() -> None:
    ahead, skipped = serving.bars(samples(peer=0.7), [FASTAPI])
    assert [bar["name"] for bar in ahead if not bar["holds"]] == []
    assert not skipped
    behind, _ = serving.bars(samples(peer=0.9), [FASTAPI])
    names = [bar["name"] for bar in behind if not bar["holds"]]
    assert names == [
        "throughput at concurrency 1, ours / fastapi",  # 1.11, and 1.25 is asked for
        "added median latency at concurrency 1, ours / fastapi",
    ]
    worst, _ = serving.bars(samples(peer=1.1), [FASTAPI])
    assert sum("fastapi" in bar["name"] and not bar["holds"] for bar in worst) == 7


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"per_s": 590}, "answered, twice the capacity, queue of 8 / capacity"),
        ({"refused_p99_ms": 51}, "p99 of the refused, twice the capacity, queue of 8"),
        ({"failed_share": 0.01}, "share neither answered nor refused, twice the capacity, queue"),
        ({"p99_ms": 61}, "p99 of the answered, twice the capacity, queue of 8 / 16 at once"),
    ],
)
def test_the_bars_of_the_overload(change: dict[str, float], missed: str) -> None:
    measured = samples(peer=0.7)
    for row in measured[serving.OURS, overload.CASES[1]]:
        row |= change
    found, _ = serving.bars(measured, [])
    (bar,) = [bar for bar in found if not bar["holds"]]
    assert bar["name"].startswith(missed)


def test_what_could_not_be_measured_is_no_bar() -> None:
    measured = samples(peer=0.7)
    for row in measured[serving.OURS, overload.CASES[1]]:
        row["offered_per_s"] = 1200
    found, skipped = serving.bars(measured, [])
    assert skipped == [
        {"name": overload.CASES[1], "why": "no more than 1200 requests/s could be offered"}
    ]
    assert not any(overload.CASES[1] in bar["name"] for bar in found)
    measured["bare engine", "batch of 1"][0]["p50_ms"] = 5
    _, skipped = serving.bars(measured, [FASTAPI])
    assert skipped[-1]["name"].startswith("added median latency")


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_a_quick_run_beside_one_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--quick` measures, but for the waits and the most connections."""
    monkeypatch.setattr(report_module, "LOOK_S", 0.1)
    monkeypatch.setattr(server_module, "DRAIN_S", 0.1)
    monkeypatch.setattr(overload, "LEAD_S", 1.0)
    monkeypatch.setattr(serving, "SINGLES", (1, 16))
    report = serving.measure(tmp_path, seconds=1, rounds=1, peers=[FASTAPI])
    servers = {row["server"] for row in report["rows"]}
    assert servers == {"bare engine", serving.OURS, FASTAPI}
    overloaded = [row for row in report["rows"] if row["case"] in overload.CASES]
    assert [row["failed_share"] for row in overloaded] == [0, 0]
    assert overloaded[1]["refused_share"] > 0
    assert len(report["bars"]) + len(report["skipped"]) >= 2 * len(serving.SINGLES) + 3
