"""One DVERGE step on the GPU at every layer: published, eager, and recorded as a CUDA graph.

ResNet-20, three members, batch 128, the recipe `cifar10`, as in `benchmarks.train_step`. The ways
take turns; a step that is to be recorded and cannot be is an error, not a slow row. On the CPU only
the ways that are not recorded are timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import bar, machine, say
from benchmarks.report import busy_percent, finish
from benchmarks.report import parser as report_parser
from benchmarks.train_step import CUDA_BAR, Side
from training.device import pick_device
from training.methods import dverge
from training.methods.dverge_draws import all_others
from training.optimizers import RateOnDevice
from training.parallel.cuda_graphs import WARM_UPS, CudaRecorder, Recorded
from training.parallel.topology import Batch


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to make the same step.

    Args:
        side: of `benchmarks.train_step`.
        recorded: as a CUDA graph.
        tf32: whether convolutions in fp32 may round to TF32, as PyTorch lets them.
        benchmark: whether cuDNN tries its algorithms out.
        deterministic: whether it takes only those that give the same bits every time.
    """

    side: str
    recorded: bool = False
    tf32: bool = True
    benchmark: bool = False
    deterministic: bool = False

    def flags(self) -> AbstractContextManager[None]:
        """Return the context in which cuDNN works this way."""
        return torch.backends.cudnn.flags(
            enabled=True,
            benchmark=self.benchmark,
            deterministic=self.deterministic,
            allow_tf32=self.tf32,
        )


BASELINE, DEFAULT = "published", "recorded"
WAYS: dict[str, Way] = {
    BASELINE: Way(side="published"),
    "eager": Way(side="product"),
    DEFAULT: Way(side="product", recorded=True),
    "recorded_benchmark": Way(side="product", recorded=True, benchmark=True),
    "recorded_deterministic": Way(side="product", recorded=True, deterministic=True),
    "letter": Way(side="letter", recorded=True),
    "fp32_eager": Way(side="product_fp32", tf32=False),
    "fp32_recorded": Way(side="product_fp32", recorded=True, tf32=False),
}


class Stepper:
    """Members that take steps one way, and what one step costs."""

    def __init__(self, way: Way, batch: int, device: torch.device) -> None:
        self._way, self._device, self._side = way, device, Side(way.side, device)
        self._recorded = self._record(batch) if way.recorded else None

    def ready(self, images: Batch, layer: int) -> float:
        """Make the steps after which the next one at `layer` costs what all others will.

        Returns:
            their seconds.

        Raises:
            UserError: the step cannot be recorded.
        """
        count = WARM_UPS + 1 if self._recorded is not None else 2
        return sum(self.seconds(images, layer) for _ in range(count))

    def seconds(self, images: Batch, layer: int) -> float:
        """Return what one step takes."""
        source, labels, target = images
        with self._way.flags():
            if self._recorded is None:
                return self._side.seconds(source, labels, target, layer)
            torch.cuda.synchronize(self._device)
            begun = time.perf_counter()
            self.step(images, layer)
            torch.cuda.synchronize(self._device)
            return time.perf_counter() - begun

    def step(self, images: Batch, layer: int) -> Tensor:
        """Make one recorded step; return each member's loss, `[members]`."""
        assert self._recorded is not None
        (distil, update), (source, labels, target) = self._recorded, images
        made = distil(layer, (source, target))
        learned = (made[other] for others in all_others(len(made)) for other in others)
        return update(0, (source, labels, *learned))[0]

    def _record(self, batch: int) -> list[Recorded]:
        members, settings = self._side.members, self._side.settings
        optimizers = [
            RateOnDevice(
                member.parameters(),
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
            )
            for member in members
        ]

        recorder = CudaRecorder(self._device, len(members))
        parts = dverge.halves(members, optimizers, settings=settings)
        return [Recorded(part, optimizers, batch, recorder) for part in parts]


def measure(
    layers: Sequence[int], rounds: int, batch: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each layer: the mean seconds of a step each way, and of the first ones."""
    ways = {key: way for key, way in WAYS.items() if device.type == "cuda" or not way.recorded}
    images = random_batch(batch, device)
    steppers = {key: Stepper(way, batch, device) for key, way in ways.items()}
    rows: list[dict[str, Any]] = []
    for layer in layers:
        first = {key: stepper.ready(images, layer) for key, stepper in steppers.items()}
        row: dict[str, Any] = {"layer": layer, **dict.fromkeys(ways, 0.0)}
        for turn in range(rounds):
            for key in list(ways)[:: 1 if turn % 2 else -1]:
                row[key] += steppers[key].seconds(images, layer) / rounds
        row["first"] = {key: round(value, 4) for key, value in first.items()}
        rows.append(row)
        say(f"layer {layer}: " + ", ".join(f"{key} {row[key] * 1e3:.2f} ms" for key in ways))
    return rows


def times(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times faster than the published step each way is, over all layers."""
    total = {key: sum(row[key] for row in rows) for key in WAYS if key in rows[0]}
    return {key: total[BASELINE] / total[key] for key in total if key != BASELINE}


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bar that this machine can measure: recorded steps need a GPU."""
    ratio = times(rows).get(DEFAULT)
    return [] if ratio is None else [bar("a step on CUDA, all layers", ratio, "times", CUDA_BAR)]


def random_batch(batch: int, device: torch.device) -> Batch:
    """Return random images, labels and target images of CIFAR-10's shape."""
    torch.manual_seed(0)
    source, target = (
        torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    return source, torch.randint(0, 10, (batch,), device=device), target


def machine_with_gpu(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on, the GPU and its libraries included."""
    found = machine() | {"torch": torch.__version__, "busy_percent": busy_percent()}
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found |= {"gpu": torch.cuda.get_device_name(device)}
        found |= {"cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def parser() -> argparse.ArgumentParser:
    """Return a parser of this benchmark's options, to be a verb's parent."""
    made = report_parser(__doc__, "layers 1, 10 and 20")
    made.add_argument("--device", default="auto")
    made.add_argument("--layers", default=",".join(map(str, range(1, 21))))
    made.add_argument("--rounds", type=int, default=5, help="steps at each layer")
    made.add_argument("--batch", type=int, default=128)
    return made


def main(options: argparse.Namespace) -> None:
    """Run the benchmark with the options of `parser`."""
    device = pick_device(options.device)
    layers = [1, 10, 20] if options.quick else [int(each) for each in options.layers.split(",")]
    here = machine_with_gpu(device)
    rows = measure(layers, options.rounds, options.batch, device)
    rows.append({"layer": "all", **times(rows), BASELINE: 1.0})
    report = {"machine": here, "rows": rows, "bars": bars(rows[:-1]), "skipped": []}
    columns = ["layer", *(key for key in WAYS if key in rows[0])]
    finish("gpu", report, columns, options)
