"""What the benchmarks share: the machine, turns, the table and the closing JSON."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Times = dict[str, list[float]]
PAUSE_S = 0.02
SHORT_S = 0.05


def machine() -> dict[str, Any]:
    """Return the machine's facts that figures depend on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    return {
        "cpu": model[1] if model else platform.processor(),
        "avx512_vnni": "avx512_vnni" in info,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime-gpu") or version("onnxruntime"),
        "numpy": np.__version__,
    }


def version(package: str) -> str:
    """Return a package's version without importing it; empty where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def turns(
    cases: Mapping[str, Callable[[], Any]], *, seconds: float, least: int = 7, most: int = 2000
) -> Times:
    """Time the cases one after the other, again and again, after a first turn that warms up.

    Each turn has an order of its own, so that none always follows the same other.

    A turn of a short case is the median of several calls after one that does not count. Before
    each a pause: threads of the session before still spin for a moment, on a core this one needs.

    Args:
        cases: names to what is timed.
        seconds: for all cases together.
        least, most: how many turns, whatever the seconds say.
    """
    times: Times = {name: [] for name in cases}
    quick = {name: min(_seconds(call) for _ in range(2)) < SHORT_S for name, call in cases.items()}
    names, order = list(cases), random.Random(0)
    end = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        order.shuffle(names)
        for name in names:
            time.sleep(PAUSE_S)
            calls = [_seconds(cases[name]) for _ in range(6 if quick[name] else 1)]
            times[name].append(statistics.median(calls[1:] or calls))
    return times


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def ratio(times: Times, of: str, to: str) -> float:
    """Return how many times faster `to` is than `of`: the median over turns."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def bar(
    name: str, value: float, unit: str, limit: float, *, at_most: bool = False
) -> dict[str, Any]:
    """Return one bar of the report."""
    holds = value <= limit if at_most else value >= limit
    return {"name": name, "value": value, "unit": unit, "bar": limit, "holds": bool(holds)}


def say(text: str) -> None:
    """Print a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def show(report: dict[str, Any], columns: list[str], *, as_json: bool) -> None:
    """Print the report: a table and the bars, and with `as_json` one JSON object last of all."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in report["rows"]:
        cells = [row.get(column, "") for column in columns]
        print(
            "| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    print()
    for entry in report["bars"]:
        word = "holds " if entry["holds"] else "MISSED"
        print(
            f"{word} {entry['name']}: {entry['value']:.3f} {entry['unit']} (bar {entry['bar']:g})"
        )
    for entry in report["skipped"]:
        print(f"skipped {entry['name']}: {entry['why']}")
    if as_json:
        sys.stdout.flush()
        print(json.dumps(report))
