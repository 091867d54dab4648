"""Our service beside FastAPI and LitServe: throughput and latency on one machine, in one run.

python -m benchmarks.serving [--seconds 5] [--rounds 3] [--json]

Every server runs one worker on the same ONNX file (3 ResNet-20, 32x32 colour, random weights:
time does not depend on them) with the same decoder and engine threads. They take turns under
`wrk`, and those whose turn it is not are stopped. Figures are medians over the rounds.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import bar, machine, say
from benchmarks.report import busy_percent, finish, turns
from benchmarks.requests import png, tensors
from benchmarks.server import Server, load
from dverge_serve.cores import cores
from dverge_serve.engine.session import Engine

SINGLES = (1, 16, 64)
BATCH, BATCH_CONNECTIONS = 32, 4
OURS = "dverge-serve"
COLUMNS = ["server", "case", "per_s", "p50_ms", "p99_ms"]


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


def servers_for(model: Path) -> list[Server]:
    """Return the three servers on one model file, each with what it is sent."""
    picture, python = png(), [sys.executable, "-m"]
    raw, as_json = {"content-type": "image/png"}, {"content-type": "application/json"}
    encoded = json.dumps({"image": base64.b64encode(picture).decode()}).encode()
    serve = ["dverge_serve", "serve", str(model), "--port", "PORT", "--device", "cpu"]
    peer = [str(model), "PORT", str(cores())]
    fastapi = [*python, "benchmarks.peers.fastapi_server", *peer]
    litserve = [*python, "benchmarks.peers.litserve_server", *peer]
    return [
        Server(OURS, [*python, *serve], "/readyz", picture, raw),
        Server("fastapi", fastapi, "/health", picture, raw),
        Server("litserve", litserve, "/health", encoded, as_json),
    ]


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
            for server in servers:
                body = folder / server.name
                found = load(server, "/predict", body, server.headers, connections, seconds)
                samples.keep(server.name, f"1 image, {connections} at once", found)
        found = load(
            servers[0],
            "/v2/models/dverge/infer",
            *(folder / "tensor", tensor_headers, BATCH_CONNECTIONS, seconds),
        )
        found["per_s"] *= BATCH
        samples.keep(OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once", found)
    return samples.rows()


def measure(folder: Path, seconds: int, rounds: int) -> dict[str, Any]:
    """Run everything and return the report."""
    here = machine() | {"busy_percent": busy_percent()}
    model = folder / "model.onnx"
    save_model(model)
    servers = servers_for(model)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DVERGE_")},
        "DVERGE_THREADS": str(cores()),
    }
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
    found, skipped = bars({(row["server"], row["case"]): row for row in rows})
    return {"machine": here, "rows": rows, "bars": found, "skipped": skipped}


def bars(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the bars, each a ratio, and those that this run could not measure."""
    found, skipped = [], []
    for connections in SINGLES[1:]:
        case = f"1 image, {connections} at once"
        ours = rows[OURS, case]
        for peer in ("fastapi", "litserve"):
            other, what = rows[peer, case], f"at concurrency {connections}, ours / {peer}"
            throughput, tail = (ours[key] / other[key] for key in ("per_s", "p99_ms"))
            found.append(bar(f"throughput {what}", throughput, "at least", 1.0))
            found.append(bar(f"p99 {what}", tail, "at most", 1.0, at_most=True))
    batches = rows[OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once"]
    share = batches["per_s"] / rows["bare engine", f"batch of {BATCH}"]["per_s"]
    found.append(
        bar(f"images/s in batches of {BATCH}, ours / bare engine", share, "at least", 0.85)
    )
    floor = rows["bare engine", "batch of 1"]["p50_ms"]
    added = {name: rows[name, "1 image, 1 at once"]["p50_ms"] - floor for name in (OURS, "fastapi")}
    name = "added median latency at concurrency 1, ours / fastapi"
    if min(added.values()) > 0:
        ratio = added[OURS] / added["fastapi"]
        found.append(bar(name, ratio, "at most", 2.0, at_most=True))
    else:
        why = "the bare engine was slower than a server: the machine was busy with something else"
        skipped.append({"name": name, "why": why})
    return found, skipped


def main() -> None:
    """Run the benchmark from the command line."""
    chosen = turns(__doc__, 5, {"wrk": "wrk"})
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), chosen.seconds, chosen.rounds)
    finish("serving", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
