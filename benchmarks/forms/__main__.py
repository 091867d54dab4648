"""One grouped network beside one branch for each member: what the rule of `export` is made from.

python -m benchmarks.forms [--seconds 2] [--json] [--save]

Both forms of random ensembles run in turns, in one thread. A call's time is that of its thread
on the processor, so that other work on the machine counts little. On x86-64 Linux with a C compiler
everything is timed twice: with this processor's instructions, and with those of AVX2 alone
(`without_avx512.c`). `speedup` is how many times faster the grouped form is.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from benchmarks.bench import bar, machine, say
from benchmarks.report import busy_percent, finish, parser
from dverge_serve.engine.card import INPUT, Card, FusionMode
from dverge_serve.engine.model_file import cpu_session
from dverge_serve.images import Preprocess
from export.fusion_choice import rule
from export.graph import build_graph
from training.models.ensemble import Ensemble
from training.models.member import Member
from training.models.resnet import resnet_stages

HIDING = Path(__file__).with_name("without_avx512.c")
SLOWER = 0.9  # a form that the rule takes may not be slower than the other one by more
LEAST_TURNS = 7
COLUMNS = ["architecture", "width", "pixels", "members", "instructions"]
COLUMNS += ["batch_1", "batch_32", "mean", "form"]


@dataclass(frozen=True)
class Case:
    """What is measured: members of one architecture, on square images."""

    architecture: str
    width: int
    pixels: int
    members: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return "-".join(map(str, (self.architecture, self.width, self.pixels, self.members)))


CASES = [
    *(Case("resnet8", 16, 8, members) for members in (2, 3, 5, 8)),
    *(Case(f"resnet{depth}", 16, 32, members) for depth in (8, 14, 20) for members in (3, 5, 8)),
    *(Case("resnet20", 16, pixels, 3) for pixels in (64, 96)),
    *(Case("resnet8", width, 32, 3) for width in (4, 8, 12, 24, 32, 64)),
    Case("resnet20", 8, 32, 3),
    Case("resnet11-bottleneck", 16, 32, 3),
]


def build(case: Case, folder: Path) -> FusionMode:
    """Write both forms of a random ensemble into `folder`; return the one that the rule takes."""
    torch.manual_seed(0)
    members: list[nn.Module] = [
        Member(resnet_stages(case.architecture, 3, case.width, 10), [0.5] * 3, [0.25] * 3).eval()
        for _ in range(case.members)
    ]
    size = (case.pixels, case.pixels)
    card = Card(
        name="benchmark",
        labels=tuple("0123456789"),
        preprocess=Preprocess(mode="RGB", resize=size, crop=size),
        members=case.members,
        dataset="none",
        weights_sha256="0" * 64,
        tool_version="benchmark",
    )
    ensemble = Ensemble(members)
    for form in get_args(FusionMode):
        data = build_graph(ensemble, replace(card, form=form))
        (folder / f"{case.name}.{form}.onnx").write_bytes(data)
    return rule(ensemble, "cpu")


def speedup(case: Case, folder: Path, batch: int, seconds: float) -> float:
    """Return how many times faster the grouped form is: the median over turns."""
    images = np.random.default_rng(0).random((batch, 3, case.pixels, case.pixels), np.float32)
    calls = []
    for form in ("branches", "grouped"):
        path = folder / f"{case.name}.{form}.onnx"
        session = cpu_session(path.read_bytes(), path, threads=1, spinning=False)
        session.run(None, {INPUT: images})
        calls.append(lambda session=session: session.run(None, {INPUT: images}))
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        if turn >= LEAST_TURNS and time.perf_counter() > end:
            break
        order = (0, 1) if turn % 2 else (1, 0)
        times = {at: _processor_time(calls[at]) for at in order}
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def _processor_time(call: Any) -> float:
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def timed(folder: Path, seconds: float, preload: Path | None = None) -> list[list[float]]:
    """Time all cases in a process of their own; return the speedups at batch 1 and 32 of each."""
    environment = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
    command = [sys.executable, "-m", "benchmarks.forms", "--time", str(folder)]
    command += ["--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[list[float]] = json.loads(done.stdout)
    return found


def _time(folder: Path, seconds: float) -> None:
    found = []
    for case in CASES:
        if not (folder / f"{case.name}.grouped.onnx").is_file():
            continue
        found.append([speedup(case, folder, batch, seconds / 2) for batch in (1, 32)])
        say(f"  {case.name}: {found[-1][0]:.2f} {found[-1][1]:.2f}")
    print(json.dumps(found))


def _preload(folder: Path) -> Path | None:
    """Return the library that hides AVX-512, where it can be made and has something to hide."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    if "avx512f" not in text or "cpuid_fault" not in text or shutil.which("cc") is None:
        return None
    made = folder / "without_avx512.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", made, HIDING], check=True)
    return made


def main() -> None:
    """Run the benchmark from the command line."""
    arguments = parser(__doc__, "two cases, a fifth of a second each")
    arguments.add_argument("--seconds", type=float, default=2.0, help="for each case")
    arguments.add_argument("--time", type=Path, help="time the files of a folder (used by itself)")
    chosen = arguments.parse_args()
    if chosen.time is not None:
        _time(chosen.time, chosen.seconds)
        return
    here = machine() | {"busy_percent": busy_percent()}
    cases = CASES[:2] if chosen.quick else CASES
    seconds = 0.2 if chosen.quick else chosen.seconds
    native = "avx512" if here["avx512_vnni"] else "this machine's"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        forms = {case: build(case, folder) for case in cases}
        preload = _preload(folder)
        kinds = {native: None} | ({"avx2": preload} if preload else {})
        for instructions, library in kinds.items():
            say(instructions)
            for case, (one, many) in zip(cases, timed(folder, seconds, library), strict=True):
                rows.append(
                    vars(case)
                    | {
                        "instructions": instructions,
                        "batch_1": one,
                        "batch_32": many,
                        "mean": math.sqrt(one * many),
                        "form": forms[case],
                    }
                )
    lost = [row["mean"] if row["form"] == "grouped" else 1 / row["mean"] for row in rows]
    bars = [bar("the form taken beside the other, worst line", min(lost), "times", SLOWER)]
    finish("forms", {"machine": here, "rows": rows, "bars": bars, "skipped": []}, COLUMNS, chosen)


if __name__ == "__main__":
    main()
