"""The exported file beside the plain branch export: three, five and eight ResNet-20.

python -m benchmarks.engine [--seconds 8] [--members 3,5,8] [--batches 1,8,32,128] [--json]

Weights are random: time does not depend on them. For each number of members the file as
`dverge export` would write it runs through the engine, and the branches through a bare session in
one call, in turns. "member logits left out" is the same file asked for the mean alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.bench import bar, machine, ratio, say, show, turns
from dverge_serve.contract import INPUT, LOGITS, MEMBER_LOGITS, Card
from dverge_serve.engine import Engine
from dverge_serve.images import Preprocess
from export.choice import build_best
from export.graph import build_graph
from training.members import Member, cifar_resnet_stages

FASTER, NEVER_BELOW, OVERHEAD = 1.25, 0.97, 1.05
COLUMNS = [
    "members",
    "batch",
    "form",
    "branches_ms",
    "engine_ms",
    "speedup",
    "bare_ms",
    "mean_only",
]


def random_members(count: int) -> tuple[list[nn.Module], Card]:
    """Return `count` ResNet-20 for 32x32 colour and ten classes."""
    torch.manual_seed(0)
    members: list[nn.Module] = [
        Member(cifar_resnet_stages(20, 3, 16, 10), [0.5] * 3, [0.25] * 3).eval()
        for _ in range(count)
    ]
    card = Card(
        name="benchmark",
        labels=tuple("0123456789"),
        preprocess=Preprocess(mode="RGB", resize=(32, 32), crop=(32, 32)),
        members=count,
        dataset="none",
        weights_sha256="0" * 64,
        tool_version="benchmark",
    )
    return members, card


def session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def measure(count: int, batches: list[int], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each batch size."""
    members, card = random_members(count)
    choice, data = build_best(members, card, "auto", "cpu")
    say(f"{count} members: {choice}")
    (folder / "model.onnx").write_bytes(data)
    engine = Engine(folder / "model.onnx", device="cpu")
    branches = session(build_graph(members, replace(card, form="branches")))
    bare = session(data)
    rows = []
    for batch in batches:
        images = np.random.default_rng(0).random((batch, 3, 32, 32), dtype=np.float32)
        both, mean, given = [LOGITS, MEMBER_LOGITS], [LOGITS], {INPUT: images}
        path = ort.RunOptions()
        path.only_execute_path_to_fetches = True
        times = turns(
            {
                "branches": lambda f=given, o=both: branches.run(o, f),
                "engine": lambda x=images: engine.run(x),
                "bare": lambda f=given, o=both: bare.run(o, f),
                "mean": lambda f=given, o=mean, p=path: bare.run(o, f, p),
            },
            seconds=seconds,
        )
        medians = {name: 1000 * statistics.median(found) for name, found in times.items()}
        rows.append(
            {
                "members": count,
                "batch": batch,
                "form": choice.form,
                "turns": len(times["engine"]),
                "branches_ms": medians["branches"],
                "engine_ms": medians["engine"],
                "speedup": ratio(times, "branches", "engine"),
                "bare_ms": medians["bare"],
                "overhead": ratio(times, "engine", "bare"),
                "mean_only": ratio(times, "bare", "mean"),
            }
        )
        say(f"  batch {batch}: {rows[-1]['speedup']:.2f}x")
    return rows


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    parser.add_argument("--members", default="3,5,8")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    here = machine()
    rows: list[dict[str, Any]] = []
    for count in map(int, options.members.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            batches = [int(batch) for batch in options.batches.split(",")]
            rows += measure(count, batches, options.seconds, Path(folder))
    bars, skipped, judged = [], [], rows
    if here["load_average_before"] > here["cores"] / 2:
        why = "the machine was busy, and a call of one image waits for every core"
        skipped.append({"name": "bars at batch 1", "why": why})
        judged = [row for row in rows if row["batch"] > 1]
    if judged:
        slowest = min(row["speedup"] for row in judged)
        bars.append(bar("slowest line against branches", slowest, "times", NEVER_BELOW))
    for row in judged:
        if (row["members"], row["batch"]) == (3, 1):
            name = "3 members, batch 1, against branches"
            bars.append(bar(name, row["speedup"], "times", FASTER))
            name = "engine's own share at batch 1, against a bare session"
            bars.append(bar(name, row["overhead"], "times", OVERHEAD, at_most=True))
    show(
        {"machine": here, "rows": rows, "bars": bars, "skipped": skipped},
        COLUMNS,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
