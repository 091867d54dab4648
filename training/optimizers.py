"""The members' optimisers: SGD for each, its settings at each step, its momentum as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from training.models.member import Member
from training.schedules import Schedule


class RateOnDevice(SGD):
    """SGD that reads its learning rate from the device, where a recorded step finds a new one.

    The same update as SGD's. PyTorch's own reads a rate on the device only in its fused form, which
    refuses gradients whose strides differ from their parameter's, as those of 1x1 kernels may.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._rates = [
            torch.tensor(group["lr"], device=group["params"][0].device)
            for group in self.param_groups
        ]

    def send_rate(self) -> None:
        """Bring the rates on the device up to date: before a replay, which only reads them."""
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            rate.fill_(group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; while it is recorded, at whatever rate is sent before each replay."""
        assert closure is None
        if not _recording():
            self.send_rate()
        for group, rate in zip(self.param_groups, self._rates, strict=True):
            parameters = [each for each in group["params"] if each.grad is not None]
            gradients = [each.grad for each in parameters]
            if not parameters:
                continue
            steps = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            if group["momentum"]:
                buffers = [self._buffer(each) for each in parameters]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_add_(buffers, steps)
                steps = buffers
            torch._foreach_add_(parameters, list(torch._foreach_mul(steps, -rate)))

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        found: Tensor = state["momentum_buffer"]
        return found


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def build_optimizers(
    members: Sequence[Member], settings: Schedule, *, on_device: bool = False
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


def set_rate(optimizers: Sequence[SGD], settings: Schedule, epoch: int, progress: float) -> None:
    """Set the optimisers' settings of a stage `progress` (0..1) of the way through `epoch`."""
    rate = settings.lr_at(epoch, progress)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
            group["clip_norm"] = settings.clip_norm


def clip(optimizer: Optimizer) -> None:
    """Scale an optimiser's gradients down to the norm that its stage allows, if they exceed it."""
    for group in optimizer.param_groups:
        if group.get("clip_norm"):
            clip_grad_norm_(group["params"], group["clip_norm"])


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
