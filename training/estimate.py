"""What a run will cost, before it is begun."""

from __future__ import annotations

import time
from typing import Any

import torch

from training import data as datasets
from training.config import Config
from training.methods import stages
from training.train import epoch_batches, prepare

TIMED_STEPS = 3


def gradient_evaluations(config: Config, images: int) -> dict[str, int]:
    """Return how many gradients of one member on one image each stage computes.

    Args:
        config: of the run.
        images: in the training part.
    """
    others = config.members - 1
    attack = config.adversarial.steps + 1
    each = {
        "standard": 1,
        "dverge": config.dverge.steps + others,
        "dverge+adversarial": config.dverge.steps + others + attack,
        "adversarial": attack,
        "adp": 1,
        "gal": 2,  # the loss's own, and through the gradient
    }
    found = {"standard": config.standard.epochs * each["standard"]}
    if config.method != "standard":
        settings = {"adversarial": config.adversarial, "adp": config.adp, "gal": config.gal}
        second = settings.get(config.method, config.dverge)
        found[second.table] = second.epochs * each[config.method]
    return {name: count * images * config.members for name, count in found.items()}


def estimate(config: Config, device: torch.device) -> dict[str, Any]:
    """Time a few steps of every stage on the run's own images and return what all will cost.

    Returns:
        parameters (of all members), training images, gradient evaluations and seconds of each
        stage.
    """
    data = datasets.load_training(config.data)
    members, optimizers = prepare(config, data, device)
    split = data.train.to(device)
    count = -(-len(split) // config.batch_size)
    seconds: dict[str, float] = {}
    for stage in stages(config, members, optimizers):
        batches = epoch_batches(split, config, stage, 0)
        stage.step(0, 0, next(batches))  # warms up
        times = []
        for number, batch in enumerate(batches):
            if number == TIMED_STEPS:
                break
            begun = time.monotonic()
            # An epoch draws one layer, and what a step costs depends on it: take several.
            stage.step(number + 1, 0, batch).sum().item()
            times.append(time.monotonic() - begun)
        seconds[stage.name] = stage.settings.epochs * count * sum(times) / max(len(times), 1)
    return {
        "parameters": sum(p.numel() for member in members for p in member.parameters()),
        "training_images": len(split),
        "gradient_evaluations": gradient_evaluations(config, len(split)),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
