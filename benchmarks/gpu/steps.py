"""One DVERGE step on the GPU at every layer: published, eager, and recorded as a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import bar, say
from benchmarks.gpu.jobs import Plan
from benchmarks.train_step import CUDA_BAR, Side
from training.methods import dverge
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
        """Make the steps after which the next one at `layer` costs what all others will."""
        count = WARM_UPS + 1 if self._recorded is not None else 2
        return sum(self.seconds(images, layer) for _ in range(count))

    def seconds(self, images: Batch, layer: int) -> float:
        """Return what one step takes."""
        source, labels, target = images
        with self._way.flags():
            if self._recorded is None:
                return self._side.seconds(source, labels, target, layer)
            return self._timed(lambda: self._stepped(images, layer))

    def _stepped(self, images: Batch, layer: int) -> Tensor:
        assert self._recorded is not None
        return self._recorded(layer, images)

    def _timed(self, step: Callable[[], Tensor]) -> float:
        torch.cuda.synchronize(self._device)
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - begun

    def _record(self, batch: int) -> Recorded:
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

        def work(layer: int, images: Batch) -> Tensor:
            source, labels, target = images
            return dverge.step(
                members, optimizers, source, labels, target, layer=layer, settings=settings
            )

        return Recorded(work, optimizers, batch, CudaRecorder(self._device, len(members)))


def measure(plan: Plan, name: str, device: torch.device) -> None:
    """Time every way at every layer; what an earlier chunk timed stays."""
    found = plan.finding(name)
    rows: list[dict[str, Any]] = found.get("rows", [])
    ways = {key: way for key, way in WAYS.items() if device.type == "cuda" or not way.recorded}
    images = _images(plan.batch, device)
    steppers = {key: Stepper(way, plan.batch, device) for key, way in ways.items()}
    for layer in plan.layers:
        if any(row["layer"] == layer for row in rows):
            continue
        first = {key: stepper.ready(images, layer) for key, stepper in steppers.items()}
        row: dict[str, Any] = {"layer": layer, **dict.fromkeys(ways, 0.0)}
        for turn in range(plan.rounds):
            for key in list(ways)[:: 1 if turn % 2 else -1]:
                row[key] += steppers[key].seconds(images, layer) / plan.rounds
        row["first"] = {key: round(value, 4) for key, value in first.items()}
        rows.append(row)
        plan.find(name, {"rows": rows, "done": False})
        say(f"layer {layer}: " + ", ".join(f"{key} {row[key] * 1e3:.2f} ms" for key in ways))
    plan.find(name, {"rows": rows, "times": times(rows, ways), "bars": bars(rows), "done": True})


def times(rows: list[dict[str, Any]], ways: Mapping[str, Way]) -> dict[str, float]:
    """Return how many times faster than the published step each way is, over all layers."""
    total = {key: sum(row[key] for row in rows) for key in ways}
    return {key: total[BASELINE] / total[key] for key in ways if key != BASELINE}


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the bar that this machine can measure: recorded steps need a GPU."""
    if any(DEFAULT not in row for row in rows):
        return []
    ratio = sum(row[BASELINE] for row in rows) / sum(row[DEFAULT] for row in rows)
    return [bar("a step on CUDA, all layers", ratio, "times", CUDA_BAR)]


def _images(batch: int, device: torch.device) -> Batch:
    torch.manual_seed(0)
    source, target = (
        torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    return source, torch.randint(0, 10, (batch,), device=device), target
