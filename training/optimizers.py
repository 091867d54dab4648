"""The members' optimisers: SGD for each, its settings at each step, its momentum as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD

from training.config import Stage
from training.models.member import Member
from training.parallel.cuda_graphs import RateOnDevice


def build_optimizers(
    members: Sequence[Member], settings: Stage, *, on_device: bool = False
) -> list[SGD]:
    """Return an optimiser for each member; `on_device`: for steps recorded as CUDA graphs."""
    kind = RateOnDevice if on_device else SGD
    return [
        kind(
            member.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        for member in members
    ]


def set_rate(optimizers: Sequence[SGD], settings: Stage, epoch: int, progress: float) -> None:
    """Give all optimisers the stage's settings `progress` (0..1) of the way through `epoch`."""
    rate = settings.lr_at(epoch, progress)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay)


def momentum_tensors(optimizers: Sequence[SGD]) -> dict[str, Tensor]:
    """Return every momentum there is under `momentum<i>.`, contiguous and on the CPU."""
    return {
        f"momentum{index}.{number}": buffer.cpu().contiguous()
        for index, optimizer in enumerate(optimizers)
        for number, parameter in enumerate(optimizer.param_groups[0]["params"])
        if (buffer := optimizer.state[parameter].get("momentum_buffer")) is not None
    }


def load_momentum(optimizers: Sequence[SGD], tensors: dict[str, Tensor]) -> None:
    """Put `momentum_tensors`' form back; other keys are left alone."""
    for index, optimizer in enumerate(optimizers):
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            if (stored := tensors.get(f"momentum{index}.{number}")) is not None:
                buffer = torch.empty_like(parameter).copy_(stored)  # in the parameter's layout
                optimizer.state[parameter]["momentum_buffer"] = buffer
