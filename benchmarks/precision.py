"""int8 and fp16 beside fp32: speed, accuracy and robustness.

python -m benchmarks.precision [--seconds 20] [--images 2000] [--run DIR] [--json]

Speed and clean accuracy are those of the paper's published checkpoint (3 ResNet-20), calibrated on
CIFAR-10 (JPEG copy) and asked about its test images; both are looked for in $DVERGE_TEST_DATA, and
--tree names the images where they are unpacked already. Robustness under transfer attacks is
measured by `dverge verify-robustness` on the fp32 file and on the int8 file of one run: --run, or
the digits recipe, trained here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.bench import bar, machine, ratio, say, turns
from benchmarks.report import busy_percent, finish, parser
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from dverge_serve.progress import show
from export.exporter import export
from export.published_checkpoint import from_checkpoint
from export.source import ExportSource
from training.data.splits import load_test
from training.device import pick_device
from training.recipe import data_overrides, load_recipe
from training.runs.directory import Run
from training.trainer import train

CHECKPOINT, IMAGES = "official_dverge_3xresnet20_eps0.07.pth", "cifar10-jpeg.tar.xz"
PRECISIONS = ("fp32", "fp16", "int8")
BATCHES = (1, 8, 32, 128)
FASTER, CLEAN, ROBUST = 1.6, 0.5, 1.0
LOST = "transfer-robust accuracy lost by int8, worst radius"
COLUMNS = ["precision", "batch", "ms", "speedup", "clean", "agreement", "eps", "transfer"]


def published(data: Path, tree: Path | None, folder: Path) -> ExportSource:
    """Return the published checkpoint with its images: `tree`, or unpacked into `folder`."""
    if tree is None:
        say("unpacking the images")
        with tarfile.open(data / IMAGES) as tar:
            tar.extractall(folder, filter="data")
        tree = next(path.parent for path in sorted(folder.rglob("train")) if path.is_dir())
    source = from_checkpoint(data / CHECKPOINT, "cifar10")
    return replace(source, config=source.config.overridden(data_overrides(str(tree))))


def accuracy_and_speed(
    source: ExportSource, folder: Path, seconds: float, count: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return one row for each precision and batch size, and the clean accuracies."""
    engines, agreements = {}, {}
    for precision in PRECISIONS:
        path = folder / f"{precision}.onnx"
        done = export(source, path, precision=precision)  # type: ignore[arg-type]
        say(f"{precision}: {done}")
        engines[precision] = Engine(path, device="cpu")
        agreements[precision] = done.agreement.share if done.agreement else 1.0
    _, test = load_test(replace(source.config.data, test_limit=count))
    images, labels = to_float(test.images.numpy()), test.labels.numpy()
    clean = {
        precision: float((engine.run_all(images).predictions == labels).mean())
        for precision, engine in engines.items()
    }
    rows = []
    for batch in BATCHES:
        given = images[:batch]
        times = turns(
            {name: partial(engine.run, given) for name, engine in engines.items()},
            seconds=seconds,
        )
        rows += [
            {
                "precision": name,
                "batch": batch,
                "ms": 1000 * statistics.median(times[name]),
                "speedup": ratio(times, "fp32", name),
                "clean": clean[name],
                "agreement": agreements[name],
            }
            for name in PRECISIONS
        ]
        say(f"  batch {batch}: int8 {rows[-1]['speedup']:.2f}x")
    return rows, clean


def robustness(run: Run, preset: str, folder: Path) -> list[dict[str, Any]]:
    """Return one row for each precision and radius, as `verify-robustness` reports it."""
    rows = []
    for precision in ("fp32", "int8"):
        path = folder / f"robust-{precision}.onnx"
        export(run, path, precision=precision)
        say(f"attacking the {precision} file")
        command = [sys.executable, "-m", "dverge_serve", "verify-robustness", str(path)]
        done = subprocess.run(
            [*command, "--run", str(run.path), "--preset", preset], stdout=sys.stderr, check=False
        )
        if done.returncode not in (0, 3):
            raise SystemExit(f"verify-robustness ended with {done.returncode}")
        report = json.loads(path.with_name(f"{path.stem}.report.json").read_bytes())
        rows += [
            {"precision": precision, "eps": row["eps"], "transfer": row["transfer"]["value"]}
            for row in report["robust_accuracy"]
        ]
    return rows


class Findings:
    """The benchmark's results: rows, bars, and what could not be measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []

    def skip(self, name: str, why: str) -> None:
        """Note what was not measured."""
        self.skipped.append({"name": name, "why": why})

    def speed(self, rows: list[dict[str, Any]], clean: dict[str, float], vnni: bool) -> None:
        """Take in speed and clean accuracy."""
        self.rows += rows
        for row in rows:
            if (row["precision"], row["batch"]) == ("int8", 32):
                title = "int8 at batch 32 against fp32"
                if vnni:
                    self.bars.append(bar(title, row["speedup"], "times", FASTER))
                else:
                    self.skip(title, "this CPU has no avx512_vnni")
        lost = 100 * (clean["fp32"] - clean["int8"])
        self.bars.append(bar("clean accuracy lost by int8", lost, "points", CLEAN, at_most=True))

    def attacks(self, rows: list[dict[str, Any]]) -> None:
        """Take in the radii of fp32, then as many of int8."""
        self.rows += rows
        half = len(rows) // 2
        losses = [
            100 * (one["transfer"] - other["transfer"])
            for one, other in zip(rows[:half], rows[half:], strict=True)
        ]
        self.bars.append(bar(LOST, max(losses), "points", ROBUST, at_most=True))


def main() -> None:
    """Run the benchmark from the command line."""
    show()
    arguments = parser(__doc__, "64 images, a second a line, no attacks but on a --run given")
    arguments.add_argument("--seconds", type=float, default=20.0, help="for each batch size")
    arguments.add_argument("--images", type=int, default=2000, help="test images")
    arguments.add_argument("--tree", type=Path, help="the images, where they are unpacked already")
    arguments.add_argument("--run", type=Path, help="attack its files; default: train digits")
    arguments.add_argument("--preset", default="quick", help="of verify-robustness")
    arguments.add_argument("--no-attacks", action="store_true", help="leave robustness out")
    chosen = arguments.parse_args()
    if chosen.quick:
        chosen.seconds, chosen.images = 1.0, 64
        chosen.no_attacks = chosen.no_attacks or chosen.run is None
    here, found = machine() | {"busy_percent": busy_percent()}, Findings()
    data = Path(os.environ.get("DVERGE_TEST_DATA", "nowhere"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (data / CHECKPOINT).is_file() and (chosen.tree or (data / IMAGES).is_file()):
            source = published(data, chosen.tree, folder)
            rows, clean = accuracy_and_speed(source, folder, chosen.seconds, chosen.images)
            found.speed(rows, clean, here["avx512_vnni"])
        else:
            why = f"no {CHECKPOINT} and {IMAGES} in $DVERGE_TEST_DATA"
            found.skip("speed and clean accuracy of int8", why)
        if chosen.no_attacks:
            found.skip(LOST, "left out")
        else:
            run = (
                Run.open_finished(chosen.run)
                if chosen.run
                else train(load_recipe("digits"), folder / "digits", device=pick_device("auto"))
            )
            found.attacks(robustness(run, chosen.preset, folder))
    report = {
        "machine": here,
        "rows": found.rows,
        "bars": found.bars,
        "skipped": found.skipped,
    }
    finish("precision", report, COLUMNS, chosen)


if __name__ == "__main__":
    main()
