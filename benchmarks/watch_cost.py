"""What the watch for attacks by queries costs the service: a part of `benchmarks.query_watch`."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.bench import bar, say
from benchmarks.requests import png
from benchmarks.server import Server, load
from benchmarks.serving import save_model

CONNECTIONS, BAR = (1, 16, 64), 0.95


def cost(folder: Path, rounds: int, seconds: int) -> tuple[list[Any], list[Any]]:
    """Return rows and bars of the service with the watch off and on, in turns."""
    model = folder / "served.onnx"
    save_model(model)
    (folder / "body").write_bytes(png())
    command = [sys.executable, "-m", "dverge_serve", "serve", str(model), "--port", "PORT"]
    servers = [
        Server(mode, command, "/readyz", b"", {"content-type": "image/png"})
        for mode in ("off", "observe")
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DVERGE_")}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    try:
        for server in servers:
            server.start(kept | {"DVERGE_WATCH": server.name}, folder / f"{server.name}.log")
            server.signal(signal.SIGSTOP)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for connections in CONNECTIONS:
                for server in servers if number % 2 else servers[::-1]:
                    before = spent(server)
                    given = folder / "body", server.headers, connections, seconds
                    per_s = load(server, "/predict", *given)["per_s"]
                    images, processor = spent(server) - before
                    each = per_s, 1000 * processor / images
                    found.setdefault((server.name, connections), []).append(each)
    finally:
        for server in servers:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()
    medians = {case: np.median(each, axis=0) for case, each in found.items()}
    rows = [
        {"case": f"watch {mode}, {connections} at once", "per_s": per_s, "cpu_ms": processor}
        for (mode, connections), (per_s, processor) in medians.items()
    ]
    bars = []
    for connections in CONNECTIONS:
        share = medians["off", connections][1] / medians["observe", connections][1]
        name = f"images for one processor second at {connections}, observe / off"
        bars.append(bar(name, float(share), "at least", BAR))
    return rows, bars


def spent(server: Server) -> npt.NDArray[np.float64]:
    """Return the images that a server has classified, and its processor time in seconds."""
    assert server.process
    with server.awake():
        url = f"http://127.0.0.1:{server.port}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
    counts = [line for line in text.splitlines() if line.startswith("dverge_predictions_total")]
    images = sum(float(line.rpartition(" ")[2]) for line in counts)
    main = psutil.Process(server.process.pid)
    times = [each.cpu_times() for each in (main, *main.children(recursive=True))]
    return np.array([images, sum(each.user + each.system for each in times)])
