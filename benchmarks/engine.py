"""The exported file beside the plain branch export: three, five and eight ResNet-20.

python -m benchmarks.engine [--seconds 20] [--members 3,5,8] [--batches 1,8,32,128] [--json]

For each number of members the file as `dverge export` would write it and the plain branches run in
turns, in one process, both through the engine ("speedup") and both in the same two engines' own
sessions ("bare_speedup"). "overhead" is the engine against its own session, call by call in turns,
as `dverge bench` measures it. Three members are the
paper's published checkpoint where $DVERGE_TEST_DATA has it; all others are random: time does not
depend on the weights. "mean_only" is what asking for the mean alone would save.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.bench import bar, machine, ratio, say, turns
from benchmarks.report import busy_percent, finish, parser
from dverge_serve.engine.benchmark import measure as share
from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS, Card
from dverge_serve.engine.session import Engine
from dverge_serve.images import Preprocess
from export.fusion_choice import build_best
from export.graph import build_graph
from export.published_checkpoint import from_checkpoint
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages

CHECKPOINT = "official_dverge_3xresnet20_eps0.07.pth"
FASTER, NEVER_BELOW, OVERHEAD = 1.25, 0.97, 1.05
BUSY = 25.0  # percent of all cores; where others use more, ratios say little
COLUMNS = [
    *("members", "weights", "batch", "form", "branches_ms", "engine_ms", "speedup"),
    *("bare_speedup", "overhead", "mean_only"),
]


def random_ensemble(count: int) -> tuple[Ensemble, Card]:
    """Return `count` ResNet-20 for 32x32 colour and ten classes."""
    torch.manual_seed(0)
    members: list[nn.Module] = [
        Member(resnet_stages("resnet20", 3, 16, 10), [0.5] * 3, [0.25] * 3).eval()
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
    return Ensemble(members), card


def measured_ensemble(count: int) -> tuple[Ensemble, Card, str]:
    """Return an ensemble, its card, and where their weights are from."""
    path = Path(os.environ.get("DVERGE_TEST_DATA", "nowhere"), CHECKPOINT)
    if count == 3 and path.is_file():
        source = from_checkpoint(path, "cifar10")
        return source.ensemble, source.card, "published"
    return *random_ensemble(count), "random"


def cases(
    engine: Engine, branches: Engine, images: npt.NDArray[np.float32]
) -> dict[str, Callable[[], Any]]:
    """Return the calls that take turns on these images."""
    both, mean, given = [LOGITS, MEMBER_LOGITS], [LOGITS], {INPUT: images}
    path = ort.RunOptions()
    path.only_execute_path_to_fetches = True
    return {
        "branches": partial(branches.run, images),
        "engine": partial(engine.run, images),
        "bare branches": partial(branches.session.run, both, given),
        "bare": partial(engine.session.run, both, given),
        "mean": partial(engine.session.run, mean, given, path),
    }


def measure(count: int, batches: list[int], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each batch size."""
    ensemble, card, weights = measured_ensemble(count)
    plan, data = build_best(ensemble, card, "auto", "cpu")
    say(f"{count} members: {plan}")
    (folder / "model.onnx").write_bytes(data)
    (folder / "branches.onnx").write_bytes(build_graph(ensemble, replace(card, form="branches")))
    engine = Engine(folder / "model.onnx", device="cpu")
    branches = Engine(folder / "branches.onnx", device="cpu")
    rows = []
    for batch in batches:
        images = np.random.default_rng(0).random((batch, *card.input_shape), dtype=np.float32)
        times = turns(cases(engine, branches, images), seconds=seconds)
        medians = {name: 1000 * statistics.median(found) for name, found in times.items()}
        rows.append(
            {
                "members": count,
                "weights": weights,
                "batch": batch,
                "form": plan.form,
                "turns": len(times["engine"]),
                "branches_ms": medians["branches"],
                "engine_ms": medians["engine"],
                "bare_ms": medians["bare"],
                "speedup": ratio(times, "branches", "engine"),
                "bare_speedup": ratio(times, "bare branches", "bare"),
                "overhead": 1 / (1 - share(engine, batch, seconds / 4).share),
                "mean_only": ratio(times, "bare", "mean"),
            }
        )
        say(f"  batch {batch}: {rows[-1]['speedup']:.2f}x")
    return rows


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bars that these rows measure."""
    slowest = min(row["speedup"] for row in rows)
    bars = [bar("slowest line against branches", slowest, "times", NEVER_BELOW)]
    for row in rows:
        if (row["members"], row["batch"]) == (3, 1):
            name = "3 members, batch 1, against branches"
            bars.append(bar(name, row["speedup"], "times", FASTER))
            name = "engine against its bare session at batch 1, 3 members"
            bars.append(bar(name, row["overhead"], "times", OVERHEAD, at_most=True))
    return bars


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parser(__doc__, "three members, batches 1 and 8, a second each")
    arguments.add_argument("--seconds", type=float, default=20.0, help="for each line of the table")
    arguments.add_argument("--members", default="3,5,8")
    arguments.add_argument("--batches", default="1,8,32,128")
    chosen = arguments.parse_args()
    if chosen.quick:
        chosen.seconds, chosen.members, chosen.batches = 1.0, "3", "1,8"
    here = machine() | {"busy_percent": busy_percent()}
    rows: list[dict[str, Any]] = []
    for count in map(int, chosen.members.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            batches = [int(batch) for batch in chosen.batches.split(",")]
            rows += measure(count, batches, chosen.seconds, Path(folder))
    bars, skipped = judge(rows), []
    if here["busy_percent"] > BUSY:
        why = f"others used {here['busy_percent']:.0f}% of the cores before it began"
        bars, skipped = [], [{"name": each["name"], "why": why} for each in bars]
    report = {"machine": here, "rows": rows, "bars": bars, "skipped": skipped}
    finish("engine", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
