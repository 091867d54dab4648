"""Our service beside other servers: throughput and latency on one machine, in one run.

python -m benchmarks.serving [--seconds 5] [--rounds 3] [--json]

Every server runs one worker on the same ONNX file (3 ResNet-20, 32x32 colour, random weights:
time does not depend on them) with the same decoder and engine threads. They take turns under
`wrk`, and those whose turn it is not are stopped. Then ours gets twice as many requests as it can
answer (`benchmarks.overload`). Figures are medians over the rounds. A peer that is not installed is
left out, and the report says so.
"""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import overload
from benchmarks.bench import bar, machine, say
from benchmarks.peers.peer import FASTAPI, PEERS, absent
from benchmarks.report import busy_percent, finish, turns
from benchmarks.requests import png, tensors
from benchmarks.server import Server, load
from dverge_serve.cores import cores
from dverge_serve.engine.session import Engine

SINGLES = (1, 16, 64)
BATCH, BATCH_CONNECTIONS = 32, 4
OURS = "dverge-serve"
COLUMNS = ["server", "case", "per_s", "p50_ms", "p99_ms", *overload.COLUMNS]


def bare_engine(run: Callable[[], Any], seconds: float) -> float:
    """Return the median time of one call, seconds."""
    times = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def save_model(path: Path) -> None:
    """Write 3 ResNet-20 with random weights as one grouped network."""
    # In here: torch would keep memory and threads of its own beside the servers.
    from benchmarks.engine import random_ensemble
    from export.graph import build_graph

    ensemble, card = random_ensemble(3)
    path.write_bytes(build_graph(ensemble, replace(card, form="grouped")))


def servers_for(model: Path, peers: Collection[str]) -> list[Server]:
    """Return our service, the same with a short queue, and these peers."""
    picture, kind = png(), {"content-type": "image/png"}
    ours = [sys.executable, "-m", "dverge_serve", "serve", str(model)]
    ours += ["--port", "PORT", "--device", "cpu"]
    short = ["env", f"DVERGE_QUEUE={overload.SHORT_QUEUE}", *ours]
    return [
        Server(OURS, ours, "/readyz", picture, kind),
        Server(f"{OURS}-short-queue", short, "/readyz", picture, kind),
        *(PEERS[name].server(name, picture) for name in peers),
    ]


def environment_for(model: Path, folder: Path) -> dict[str, str]:
    """Return the servers' environment: the same model and threads for all, and no telemetry."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DVERGE_")}
    return kept | {
        "DVERGE_THREADS": str(cores()),
        "PEER_MODEL": str(model),
        "PEER_THREADS": str(cores()),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home folder
    }


class Samples:
    """What was measured, by server and case, a sample for each round."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[dict[str, float]]] = {}

    def keep(self, name: str, case: str, result: dict[str, float]) -> None:
        """Keep one round's figures."""
        self._found.setdefault((name, case), []).append(result)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each server and case: the median of each figure."""
        return [
            {"server": name, "case": case}
            | {key: statistics.median(each[key] for each in found) for key in found[0]}
            for (name, case), found in self._found.items()
        ]


def take_turns(
    servers: list[Server], engine: Engine, folder: Path, seconds: int, rounds: int
) -> list[dict[str, Any]]:
    """Load the started servers and the bare engine in turns; return the rows."""
    samples = Samples()
    ours, short, *others = servers
    tensor, tensor_headers = tensors(BATCH)
    (folder / "tensor").write_bytes(tensor)
    for server in servers:
        (folder / server.name).write_bytes(server.body)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for batch in (1, BATCH):
            images = np.zeros((batch, 3, 32, 32), dtype=np.float32)
            median = bare_engine(partial(engine.run, images), seconds / 2)
            result = {"per_s": batch / median, "p50_ms": median * 1000}
            samples.keep("bare engine", f"batch of {batch}", result)
        for connections in SINGLES:
            for server in (ours, *others):
                body = folder / server.name
                found = load(server, "/predict", body, server.headers, connections, seconds)
                samples.keep(server.name, f"1 image, {connections} at once", found)
                if server is ours:
                    capacity = found["per_s"]  # at last, with the most connections
        found = load(
            ours,
            "/v2/models/dverge/infer",
            *(folder / "tensor", tensor_headers, BATCH_CONNECTIONS, seconds),
        )
        found["per_s"] *= BATCH
        samples.keep(OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once", found)
        for case, server in zip(overload.CASES, (ours, short), strict=True):
            samples.keep(OURS, case, overload.measure(server, capacity, seconds))
    return samples.rows()


def measure(
    folder: Path, seconds: int, rounds: int, peers: Collection[str] = tuple(PEERS)
) -> dict[str, Any]:
    """Run everything and return the report."""
    here = machine() | {"busy_percent": busy_percent()}
    model = folder / "model.onnx"
    save_model(model)
    left_out = absent(peers)
    peers = [peer for peer in peers if peer not in left_out]
    servers = servers_for(model, peers)
    environment = environment_for(model, folder)
    try:
        for server in servers:
            server.start(environment, folder / f"{server.name}.log")
            server.signal(signal.SIGSTOP)
        with Engine(model, device="cpu", threads=cores()) as engine:
            engine.warm_up((1, BATCH))
            rows = take_turns(servers, engine, folder, seconds, rounds)
    finally:
        for server in servers:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()
    found, skipped = bars({(row["server"], row["case"]): row for row in rows}, peers)
    skipped += [{"name": name, "why": why} for name, why in left_out.items()]
    return {"machine": here, "rows": rows, "bars": found, "skipped": skipped}


def bars(
    rows: dict[tuple[str, str], dict[str, Any]], peers: Collection[str]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the bars, and those that this run could not measure."""
    found, skipped = overload.bars(
        {case: row for (server, case), row in rows.items() if server == OURS},
        *(f"1 image, {connections} at once" for connections in (overload.UNLOADED, SINGLES[-1])),
    )
    for connections in SINGLES:
        case = f"1 image, {connections} at once"
        ours = rows[OURS, case]
        for peer in peers:
            other, what = rows[peer, case], f"at concurrency {connections}, ours / {peer}"
            throughput, tail = (ours[key] / other[key] for key in ("per_s", "p99_ms"))
            least = 1.25 if (peer, connections) == (FASTAPI, 1) else 1.0
            found.append(bar(f"throughput {what}", throughput, "at least", least))
            found.append(bar(f"p99 {what}", tail, "at most", 1.0, at_most=True))
    batches = rows[OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once"]
    share = batches["per_s"] / rows["bare engine", f"batch of {BATCH}"]["per_s"]
    found.append(
        bar(f"images/s in batches of {BATCH}, ours / bare engine", share, "at least", 0.93)
    )
    name = "added median latency at concurrency 1, ours / fastapi"
    if FASTAPI in peers:
        floor = rows["bare engine", "batch of 1"]["p50_ms"]
        case = "1 image, 1 at once"
        added = {server: rows[server, case]["p50_ms"] - floor for server in (OURS, FASTAPI)}
        if min(added.values()) > 0:
            ratio = added[OURS] / added[FASTAPI]
            found.append(bar(name, ratio, "at most", 0.75, at_most=True))
        else:
            why = "the bare engine was slower than a server: the machine was busy otherwise"
            skipped.append({"name": name, "why": why})
    return found, skipped


def main() -> None:
    """Run the benchmark from the command line."""
    chosen = turns(__doc__, 5, {"wrk": "wrk"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        report = measure(Path(folder), chosen.seconds, chosen.rounds)
    finish("serving", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
