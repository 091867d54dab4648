"""Our service beside other servers: throughput and latency on one machine, in one run.

python -m benchmarks.serving [--seconds 5] [--rounds 3] [--json]

Every server runs one worker on the same ONNX file (3 ResNet-20, 32x32 colour, random weights:
time does not depend on them) with the same decoder and engine threads. They take turns under
`wrk`, and those whose turn it is not are stopped. Then ours gets twice as many requests as it can
answer (`benchmarks.overload`). Figures are medians over the rounds. So are ratios, taken between
neighbours within each round: a machine's speed may change from minute to minute. A peer that is not
installed is left out, and the report says so.
"""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
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
# Of few requests a second, those under way as `wrk` begins and stops are a large part: they are
# measured longer.
BATCH_LONGER = 4
OURS = "dverge-serve"
Which = tuple[str, str]  # a server and a case
Samples = dict[Which, list[dict[str, float]]]  # what was measured, once a round
COLUMNS = ["server", "case", "per_s", "p50_ms", "p99_ms", *overload.COLUMNS]


def call_times(engine: Engine, batch: int, seconds: float) -> list[float]:
    """Return how long each call of the engine alone took, seconds."""
    images = np.zeros((batch, 3, 32, 32), dtype=np.float32)
    times = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        engine.run(images)
        times.append(time.perf_counter() - begun)
    return times


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


def medians(samples: Samples) -> list[dict[str, Any]]:
    """Return one row for each server and case: the median of each figure over the rounds."""
    return [
        {"server": name, "case": case}
        | {key: statistics.median(each[key] for each in found) for key in found[0]}
        for (name, case), found in samples.items()
    ]


def ratio(samples: Samples, ours: Which, other: Which, key: str) -> float:
    """Return the median over the rounds of how a figure compares: a machine's speed may change."""
    pairs = zip(samples[ours], samples[other], strict=True)
    return statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)


def take_turns(
    servers: list[Server], engine: Engine, folder: Path, seconds: int, rounds: int
) -> Samples:
    """Load the started servers and the bare engine in turns."""
    samples: Samples = defaultdict(list)
    ours, short, *others = servers
    tensor, tensor_headers = tensors(BATCH)
    (folder / "tensor").write_bytes(tensor)
    for server in servers:
        (folder / server.name).write_bytes(server.body)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        keep_bare(samples, 1, call_times(engine, 1, seconds / 2))
        for connections in SINGLES:
            for server in (ours, *others):
                body = folder / server.name
                found = load(server, "/predict", body, server.headers, connections, seconds)
                samples[server.name, f"1 image, {connections} at once"].append(found)
                if server is ours:
                    capacity = found["per_s"]  # at last, with the most connections
        longer = seconds * BATCH_LONGER
        times = call_times(engine, BATCH, longer / 2)
        found = load(
            ours,
            "/v2/models/dverge/infer",
            *(folder / "tensor", tensor_headers, BATCH_CONNECTIONS, longer),
        )
        found["per_s"] *= BATCH
        samples[OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once"].append(found)
        times += call_times(engine, BATCH, longer / 2)  # a machine's speed drifts
        keep_bare(samples, BATCH, times)
        for case, server in zip(overload.CASES, (ours, short), strict=True):
            samples[OURS, case].append(overload.measure(server, capacity, seconds))
    return samples


def keep_bare(samples: Samples, batch: int, times: list[float]) -> None:
    """Keep what the engine alone came to: its throughput, as of a server, and the median."""
    result = {
        "per_s": batch * len(times) / sum(times),
        "p50_ms": statistics.median(times) * 1000,
    }
    samples["bare engine", f"batch of {batch}"].append(result)


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
            samples = take_turns(servers, engine, folder, seconds, rounds)
    finally:
        for server in servers:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()
    found, skipped = bars(samples, peers)
    skipped += [{"name": name, "why": why} for name, why in left_out.items()]
    return {"machine": here, "rows": medians(samples), "bars": found, "skipped": skipped}


def bars(
    samples: Samples, peers: Collection[str]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the bars, and those that this run could not measure."""
    found, skipped = overload.bars(
        {row["case"]: row for row in medians(samples) if row["server"] == OURS},
        *(f"1 image, {connections} at once" for connections in (overload.UNLOADED, SINGLES[-1])),
    )
    for connections in SINGLES:
        case = f"1 image, {connections} at once"
        for peer in peers:
            what = f"at concurrency {connections}, ours / {peer}"
            pair = (OURS, case), (peer, case)
            throughput, tail = (ratio(samples, *pair, key) for key in ("per_s", "p99_ms"))
            least = 1.25 if (peer, connections) == (FASTAPI, 1) else 1.0
            found.append(bar(f"throughput {what}", throughput, "at least", least))
            found.append(bar(f"p99 {what}", tail, "at most", 1.0, at_most=True))
    batches = (OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once")
    share = ratio(samples, batches, ("bare engine", f"batch of {BATCH}"), "per_s")
    found.append(
        bar(f"images/s in batches of {BATCH}, ours / bare engine", share, "at least", 0.93)
    )
    name = "added median latency at concurrency 1, ours / fastapi"
    if FASTAPI in peers:
        case = "1 image, 1 at once"
        which = ("bare engine", "batch of 1"), (OURS, case), (FASTAPI, case)
        added = [
            (ours["p50_ms"] - floor["p50_ms"], other["p50_ms"] - floor["p50_ms"])
            for floor, ours, other in zip(*(samples[each] for each in which), strict=True)
        ]
        if min(map(min, added)) > 0:
            found.append(
                bar(
                    *(name, statistics.median(ours / other for ours, other in added)),
                    *("at most", 0.75),
                    at_most=True,
                )
            )
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
