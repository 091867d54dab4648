"""The choice of a model file's form: by a rule, so that the same run gives the same file.

The rule was made by measurement (`python -m benchmarks.forms`). ONNX Runtime's convolutions on a
CPU work on blocks of 16 channels with AVX-512, of 8 with AVX2. A grouped convolution is as fast as
its groups alone where each has whole blocks, and else up to a third slower; and one grouped network
spares the threads a part of their waiting for each other. `measure` times both forms on the device
that the file is meant for; two measurements are never equal, and may give two different files.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from torch import nn

from dverge_serve.engine.card import Card, FusionMode
from dverge_serve.engine.providers import Device, pick_device
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.progress import say
from export.fusing import can_group
from export.graph import build_graph
from training.models.ensemble import Ensemble
from training.models.member import Member

# For one grouped network, each member's channels in every convolution but the first must be a
# multiple of this. On a GPU nothing was measured: grouped, which launches fewer kernels.
BLOCK: dict[str, int] = {"cpu": 16, "cuda": 1}
MARGIN = 1.25  # branches must measure this much faster to be chosen
BATCHES = (1, 32)
SECONDS = 0.5  # for each batch size, two forms together
LEAST_ROUNDS = 9
SLOW_S = 0.05  # from here on an image costs so much that a batch says nothing new

RequestedMode = Literal["auto", "measure", "branches", "grouped"]
Target = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class FusionPlan:
    """The form that was chosen for a model file.

    Args:
        form: what the file is.
        target: the device it was chosen for, `cpu` or `cuda`.
        speedups: batch size to how many times faster one network was than branches; empty where
            nothing was measured.
    """

    form: FusionMode
    target: str
    speedups: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        name = {"grouped": "one grouped network", "branches": "one branch for each member"}
        told = ", ".join(f"{ratio:.2f}x at batch {size}" for size, ratio in self.speedups.items())
        measured = f"; grouped is {told} as fast as branches" if told else ""
        return f"{name[self.form]} for {self.target}{measured}"


def build_best(
    ensemble: Ensemble, card: Card, requested: RequestedMode, target: Target
) -> tuple[FusionPlan, bytes]:
    """Choose a form; return it with the bytes of the model file.

    Args:
        ensemble: in evaluation mode, on the CPU.
        card: of the file to be, but for `form` and `target`.
        requested: a form; `auto` by the rule, `measure` by timing, where there is a choice.
        target: what the file is to run on; `auto` is what is here.

    Raises:
        UserError: members that cannot be grouped, or CUDA to be measured where there is none.
    """
    groupable = can_group(ensemble)
    if requested == "grouped" and not groupable:
        raise UserError(
            "these members cannot become one grouped network",
            "two or more of one architecture and normalisation",
            "use `form` branches",
        )
    if requested != "measure" or not groupable:
        # What is not measured needs no device here.
        device = pick_device(target) if target == "auto" else target
        named = requested in get_args(FusionMode)
        form = cast(FusionMode, requested) if named else rule(ensemble, device)
        plan = FusionPlan(form, device)
        return plan, build_graph(ensemble, replace(card, form=form, target=plan.target))
    try:
        device = pick_device(target)
        forms = {
            form: build_graph(ensemble, replace(card, form=form, target=device))
            for form in get_args(FusionMode)
        }
        # The device is named: one that does not work is an error, never replaced in silence.
        found = speedups(forms["branches"], forms["grouped"], device)
    except UserError as error:
        if target == "cuda":
            next_step = "measure there, or name a form: `form` grouped|branches"
            raise UserError(error.found, error.expected, next_step) from error
        if target == "cpu" or pick_device(target) == "cpu":
            raise
        say(f"{error.found}: the file is made for the CPU")
        return build_best(ensemble, card, requested, "cpu")
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in found.values()))
    chosen: FusionMode = "branches" if mean < 1 / MARGIN else "grouped"
    return FusionPlan(chosen, device, found), forms[chosen]


def rule(ensemble: Ensemble, target: str) -> FusionMode:
    """Return the form that a file gets unless one is named or measured.

    Args:
        ensemble: in evaluation mode.
        target: the device it is meant for, `cpu` or `cuda`.
    """
    if not can_group(ensemble):
        return "branches"
    first, block = next(iter(ensemble)), BLOCK[target]
    assert isinstance(first, Member)
    channels = [
        count
        for stage in first.stages[1:]
        for layer in stage.modules()
        if isinstance(layer, nn.Conv2d)
        for count in (layer.in_channels, layer.out_channels)
    ]
    return "branches" if any(count % block for count in channels) else "grouped"


def speedups(slow: bytes, fast: bytes, device: Device) -> dict[int, float]:
    """Return batch size to how many times faster the engine runs `fast` than `slow`.

    The two take turns, and the fastest call of each counts: other work on the machine can only
    make a call slower.
    """
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        pair = []
        for name, data in (("slow.onnx", slow), ("fast.onnx", fast)):
            Path(folder, name).write_bytes(data)
            pair.append(Engine(Path(folder, name), device=device))
    for batch in BATCHES:
        images = np.zeros((batch, *pair[0].card.input_shape), np.float32)
        first = [_seconds(engine, images) for engine in pair]  # also warms up
        best = list(first)
        rounds, end = 0, time.perf_counter() + SECONDS
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            for form, engine in enumerate(pair):
                best[form] = min(best[form], _seconds(engine, images))
            rounds += 1
        found[batch] = best[0] / best[1]
        if min(first) > SLOW_S * batch:
            break
    for engine in pair:
        engine.close()
    return found


def _seconds(engine: Engine, images: npt.NDArray[np.float32]) -> float:
    begun = time.perf_counter()
    engine.run(images)
    return time.perf_counter() - begun
