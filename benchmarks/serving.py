"""Our service beside FastAPI and LitServe: throughput and latency on one machine, in one run.

python -m benchmarks.serving [--seconds 5] [--rounds 3] [--json]

Every server runs one worker on the same ONNX file (3 ResNet-20, 32x32 colour, random weights:
time does not depend on them) with the same decoder and engine threads. They take turns under
`wrk`, and those whose turn it is not are stopped. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from PIL import Image

from dverge_serve.contract import Card
from dverge_serve.engine import Engine
from dverge_serve.images import Preprocess
from dverge_serve.served import cores

HERE = Path(__file__).parent
SINGLES = (1, 16, 64)
BATCH, BATCH_CONNECTIONS = 32, 4
OURS = "dverge-serve"


@dataclass
class Server:
    """A server under test: what starts it, what it is sent."""

    name: str
    command: list[str]
    health: str
    body: bytes
    headers: dict[str, str]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, environment: dict[str, str], log: Path) -> None:
        self.port = _free_port()
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                url = f"http://127.0.0.1:{self.port}{self.health}"
                urllib.request.urlopen(url, timeout=2).close()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} does not start:\n{log.read_text()}")
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """Signal the server and its workers, which live in sessions of their own."""
        assert self.process
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            for process in [*main.children(recursive=True), main]:
                process.send_signal(number)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)


def load(
    server: Server, path: str, body: Path, headers: dict[str, str], connections: int, seconds: float
) -> dict[str, float]:
    """Return what `wrk` measured, after a second of warming up."""
    lines = "\n".join(f"{name}: {value}" for name, value in headers.items())
    environment = {**os.environ, "LOAD_BODY": str(body), "LOAD_HEADERS": lines}
    with server.awake():
        for duration in (1.0, seconds):
            done = subprocess.run(
                [
                    *("wrk", "-t1", f"-c{connections}", f"-d{duration:g}s", "--timeout", "30s"),
                    *("-s", str(HERE / "load.lua"), f"http://127.0.0.1:{server.port}{path}"),
                ],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    result: dict[str, float] = json.loads(found[1])
    if result["errors"] or not result["requests"]:
        raise SystemExit(f"{server.name} answered with errors: {result}")
    result["per_s"] = result["requests"] / result["seconds"]
    return result


def bare_engine(run: Callable[[], Any], seconds: float) -> float:
    """Return the median time of one call, seconds."""
    times = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def save_model(path: Path) -> None:
    """Write 3 ResNet-20 with random weights, 32x32 colour, 10 classes."""
    import torch

    from export.graph import build_graph
    from training.members import Member, cifar_resnet_stages

    torch.manual_seed(0)
    members = [
        Member(cifar_resnet_stages(20, 3, 16, 10), (0.5,) * 3, (0.25,) * 3).eval() for _ in range(3)
    ]
    card = Card(
        name="benchmark",
        labels=tuple("0123456789"),
        preprocess=Preprocess(mode="RGB", resize=(32, 32), crop=(32, 32)),
        members=3,
        dataset="none",
        weights_sha256="0" * 64,
        tool_version="0",
    )
    path.write_bytes(build_graph(members, card))


def save_png() -> bytes:
    # Smooth as photographs are, so that it compresses and decodes like one.
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def tensor_request() -> tuple[bytes, dict[str, str]]:
    """Return a binary V2 request of 32 images, asking for the logits in binary."""
    values = np.random.default_rng(0).random((BATCH, 3, 32, 32), dtype=np.float32).tobytes()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "images",
                    "shape": [BATCH, 3, 32, 32],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(values)},
                }
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(header)),
    }
    return header + values, headers


def measure(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    """Run everything and return the report."""
    model, threads, load_average = folder / "model.onnx", cores(), os.getloadavg()[0]
    save_model(model)
    png = save_png()
    python = [sys.executable, "-m"]
    raw, as_json = {"content-type": "image/png"}, {"content-type": "application/json"}
    encoded = json.dumps({"image": base64.b64encode(png).decode()}).encode()
    arguments = [str(model), "PORT", str(threads)]
    servers = [
        Server(
            OURS,
            [*python, "dverge_serve", "serve", str(model), "--port", "PORT", "--device", "cpu"],
            *("/readyz", png, raw),
        ),
        Server(
            "fastapi", [*python, "benchmarks.peers.fastapi_server", *arguments], "/health", png, raw
        ),
        Server(
            "litserve",
            [*python, "benchmarks.peers.litserve_server", *arguments],
            *("/health", encoded, as_json),
        ),
    ]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DVERGE_")},
        "DVERGE_THREADS": str(threads),
    }
    engine = Engine(model, device="cpu", threads=threads)
    one = np.zeros((1, 3, 32, 32), dtype=np.float32)
    many = np.zeros((BATCH, 3, 32, 32), dtype=np.float32)
    engine.warm_up((1, BATCH))
    samples: dict[tuple[str, str], list[dict[str, float]]] = {}

    def keep(name: str, case: str, result: dict[str, float]) -> None:
        samples.setdefault((name, case), []).append(result)

    try:
        for server in servers:
            server.start(environment, folder / f"{server.name}.log")
            (folder / server.name).write_bytes(server.body)
            server.signal(signal.SIGSTOP)
        tensor, tensor_headers = tensor_request()
        (folder / "tensor").write_bytes(tensor)
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}")
            for batch, images in ((1, one), (BATCH, many)):
                median = bare_engine(partial(engine.run, images), seconds / 2)
                result = {"per_s": batch / median, "p50_ms": median * 1000, "p99_ms": float("nan")}
                keep("bare engine", f"batch of {batch}", result)
            for connections in SINGLES:
                for server in servers:
                    body = folder / server.name
                    found = load(server, "/predict", body, server.headers, connections, seconds)
                    keep(server.name, f"1 image, {connections} at once", found)
            found = load(
                servers[0],
                "/v2/models/dverge/infer",
                *(folder / "tensor", tensor_headers, BATCH_CONNECTIONS, seconds),
            )
            found["per_s"] *= BATCH
            keep(OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once", found)
    finally:
        for server in servers:
            if server.process:
                server.signal(signal.SIGKILL)
                server.process.wait()
    rows: list[dict[str, Any]] = [
        {
            "server": name,
            "case": case,
            **{
                key: statistics.median(sample[key] for sample in found)
                for key in ("per_s", "p50_ms", "p99_ms")
            },
        }
        for (name, case), found in samples.items()
    ]
    found_bars, skipped = bars({(row["server"], row["case"]): row for row in rows})
    return {
        "machine": machine(threads, load_average),
        "rows": rows,
        "bars": found_bars,
        "skipped": skipped,
    }


def bars(
    rows: dict[tuple[str, str], dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the bars, each a ratio, and those that this run could not measure."""
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []

    def bar(name: str, value: float, unit: str, limit: float, at_most: bool) -> None:
        holds = value <= limit if at_most else value >= limit
        found.append({"name": name, "value": value, "unit": unit, "bar": limit, "holds": holds})

    for connections in SINGLES[1:]:
        case = f"1 image, {connections} at once"
        ours = rows[OURS, case]
        for peer in ("fastapi", "litserve"):
            other = rows[peer, case]
            what = f"at concurrency {connections}, ours / {peer}"
            bar(f"throughput {what}", ours["per_s"] / other["per_s"], "ratio, at least", 1.0, False)
            bar(f"p99 {what}", ours["p99_ms"] / other["p99_ms"], "ratio, at most", 1.0, True)
    batches = rows[OURS, f"{BATCH} images, {BATCH_CONNECTIONS} at once"]
    bare = rows["bare engine", f"batch of {BATCH}"]
    bar(
        f"images/s in batches of {BATCH}, ours / bare engine",
        *(batches["per_s"] / bare["per_s"], "ratio, at least", 0.85, False),
    )
    floor = rows["bare engine", "batch of 1"]["p50_ms"]
    added = {name: rows[name, "1 image, 1 at once"]["p50_ms"] - floor for name in (OURS, "fastapi")}
    if min(added.values()) > 0:
        bar(
            "added median latency at concurrency 1, ours / fastapi",
            *(added[OURS] / added["fastapi"], "ratio, at most", 2.0, True),
        )
    else:
        why = "the bare engine was slower than a server: the machine was busy with something else"
        skipped.append({"name": "added median latency at concurrency 1", "why": why})
    return found, skipped


def machine(threads: int, load_average: float) -> dict[str, Any]:
    """Return what the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": threads,
        "load_average_before": load_average,
        "python": platform.python_version(),
        "onnxruntime": ort.__version__,
    }


def table(report: dict[str, Any]) -> None:
    """Print the report for people."""
    print(f"{'server':<14}{'case':<24}{'images/s':>10}{'p50 ms':>10}{'p99 ms':>10}")
    for row in report["rows"]:
        figures = "".join(f"{row[key]:>10.2f}" for key in ("p50_ms", "p99_ms"))
        print(f"{row['server']:<14}{row['case']:<24}{row['per_s']:>10.1f}{figures}")
    print()
    for entry in report["bars"]:
        word = "holds" if entry["holds"] else "MISSED"
        print(f"{word:<7}{entry['name']}: {entry['value']:.2f} ({entry['unit']} {entry['bar']:g})")
    for entry in report["skipped"]:
        print(f"skipped {entry['name']}: {entry['why']}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each server gets")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed; on Debian: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options.seconds, options.rounds)
    table(report)
    if options.json:
        sys.stdout.flush()
        print(json.dumps(report).replace("NaN", "null"))


if __name__ == "__main__":
    main()
