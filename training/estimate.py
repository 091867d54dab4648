"""Cost estimates: gradient evaluations and seconds of a run that has not begun."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import count, islice, repeat
from typing import Any

import torch
from torch import Tensor

from dverge_serve.errors import UserError
from dverge_serve.progress import duration
from training.budget import gradient_evaluations, within_budget
from training.config import Config
from training.data.class_counts import balance
from training.data.near_duplicates import crossing
from training.data.splits import TrainingData, load_training
from training.method_registry import METHODS
from training.methods import TrainingStage, epoch_batches, stages
from training.methods.dverge_draws import draw_layer
from training.methods.overlap import overlaps, step_losses
from training.methods.stored_images import StoredImages, describe_images
from training.models.member import Member
from training.models.pretrained import Start, skipped
from training.parallel import cuda_graphs
from training.parallel.topology import SINGLE_PROCESS
from training.trainer import prepare

TIMED_STEPS = 3
WORK = 0.9  # share of a time budget that is for steps, the rest for measuring and saving


def estimate(
    config: Config, device: torch.device, data: TrainingData | None = None
) -> dict[str, Any]:
    """Time a few steps of every stage on the run's own images and return what all will cost.

    Args:
        config: of the run.
        device: where it will be trained.
        data: the images, where the caller has loaded them already.

    Returns:
        parameters (of all members), training images, epochs, gradient evaluations and seconds of
        each stage that will be run, and notes: lines about the classes and the starting weights.
    """
    start = Start.read(config)
    data = load_training(config.data) if data is None else data
    config = within_budget(config, data)
    members, optimizers = prepare(config, data, device, start=start)
    notes = [*balance(data), *crossing(data), *([start.describe(config, members)] if start else [])]
    notes += describe_images(config, data)
    split = data.train.to(device)
    steps = -(-len(split) // config.batch_size)
    evaluations = gradient_evaluations(config, len(split))
    stored = StoredImages.stand_in(config, data)
    plan = stages(config, members, optimizers, stored=stored)
    if skipped(config, members, start):
        evaluations.pop(plan.pop(0).name)
    seconds: dict[str, float] = {}
    if start and config.head_views and (drawn := sum(start.drawn(members))):
        source = next(epoch_batches(split, config, plan[0], 0))[0]
        told = duration(config.head_views * steps * drawn * _forward_seconds(members[0], source))
        notes.append(f"{drawn} last layers: fitted to features first, about {told} on {device}")
    for stage in plan:
        batches = list(islice(epoch_batches(split, config, stage, 0), TIMED_STEPS))
        epochs = _epochs_to_time(config, stage, members)
        times = []
        for number, epoch in enumerate(epochs):
            batch = batches[number % len(batches)]
            if cuda_graphs.wanted(config, device):  # each layer is recorded by itself
                untimed = cuda_graphs.WARM_UPS + 1
            else:
                untimed = int(number == 0 or device.type == "cuda")
            for _ in range(untimed):
                float(stage.step(epoch, 0, batch).sum())  # a GPU is waited for
            made = 2 if overlaps(stage.step, config.members, device, SINGLE_PROCESS) else 1
            begun = time.monotonic()
            again = repeat((0, batch), made)
            for losses in step_losses(stage, epoch, again, optimizers, steps, SINGLE_PROCESS):
                float(losses.sum())
            times.append((time.monotonic() - begun) / made)
        seconds[stage.name] = stage.settings.epochs * steps * sum(times) / len(times)
    return {
        "parameters": sum(p.numel() for member in members for p in member.parameters()),
        "training_images": len(split),
        "epochs": {stage.name: stage.settings.epochs for stage in plan},
        "gradient_evaluations": evaluations,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "notes": notes,
    }


def fit_to_time(
    config: Config, seconds: float, device: torch.device, data: TrainingData | None = None
) -> tuple[Config, dict[str, Any]]:
    """Return settings whose stages have fewer epochs, all in the same proportion, and their cost.

    Args:
        config: of the run; it never gets more epochs than these.
        seconds: that training may take here, measuring and saving included.
        device, data: as for `estimate`.

    Raises:
        UserError: not even one epoch of each stage is done in that time, or a method with source
            models.
    """
    if METHODS[config.method].sources:
        raise UserError(
            f"`budget` with method {config.method}, whose source models are not timed",
            "epochs by name",
            "use `overrides` transfer.epochs=10",
        )
    data = load_training(config.data) if data is None else data
    config = within_budget(config, data)
    cost = estimate(config, device, data)
    per_epoch = {stage: each / cost["epochs"][stage] for stage, each in cost["seconds"].items()}
    share = WORK * seconds / max(sum(cost["seconds"].values()), 0.1)  # they are rounded
    epochs = {stage: min(count, int(share * count)) for stage, count in cost["epochs"].items()}
    if not all(epochs.values()):
        least = seconds / (share * min(cost["epochs"].values()))
        raise UserError(
            f"`budget` {duration(seconds)}, less than an epoch of every stage takes here",
            f"{duration(least + 1)} or more",
            "or a smaller network, or fewer images",
        )
    config = config.overridden({f"{stage}.epochs": count for stage, count in epochs.items()})
    evaluations = gradient_evaluations(config, cost["training_images"])
    return config, cost | {
        "epochs": epochs,
        "gradient_evaluations": {stage: evaluations[stage] for stage in epochs},
        "seconds": {stage: round(count * per_epoch[stage], 1) for stage, count in epochs.items()},
    }


@torch.no_grad()
def _forward_seconds(member: Member, images: Tensor) -> float:
    """Return what the second of two passes in evaluation mode takes."""
    for _ in range(2):
        begun = time.monotonic()
        float(member.eval()(images).sum())
    return time.monotonic() - begun


def _epochs_to_time(config: Config, stage: TrainingStage, members: Sequence[Member]) -> list[int]:
    """Return epochs whose steps stand for all: of DVERGE's, those that draw layers evenly spread.

    What a step costs grows with the layer it draws; a few at random would say little.
    """
    if not stage.method.pairs:
        return list(range(TIMED_STEPS))
    deepest = max(member.depth for member in members)
    later = () if config.dverge.layer_every == "epoch" else (0,)  # the batch's number, if need be
    layers = [math.ceil((part + 0.5) / TIMED_STEPS * deepest) for part in range(TIMED_STEPS)]
    return [
        next(epoch for epoch in count() if draw_layer(config, deepest, epoch, *later) == layer)
        for layer in layers
    ]
