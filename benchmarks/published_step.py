"""One DVERGE step as the published procedure runs it: the baseline of `train_step`.

Written from the procedure's description: each distillation step passes source and target through
the member in training mode, back-propagates into parameters and image alike, and throws the
parameters' gradients away; members take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from training.models.member import Member
from training.schedules import Dverge


def distill(
    member: Member, source: Tensor, target: Tensor, *, layer: int, settings: Dverge
) -> Tensor:
    """Return distilled images, with the procedure's waste."""
    member.train()
    z = source.clone()
    accumulated = torch.zeros_like(source)
    for _ in range(settings.steps):
        z = z.detach().requires_grad_()
        seen = member(z, layer)
        wanted = member(target, layer)
        loss = (seen - wanted).pow(2).mean()
        member.zero_grad()
        loss.backward()
        gradient = z.grad
        assert gradient is not None
        norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        accumulated = settings.decay * accumulated + gradient / norm
        z = z.detach() - settings.step_size * accumulated.sign()
        z = torch.min(torch.max(z, source - settings.eps), source + settings.eps).clamp(0, 1)
    return z.detach()


def step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    settings: Dverge,
) -> None:
    """Make one step: all distil in turn, then each learns from the others' images in turn."""
    distilled = [distill(m, source, target, layer=layer, settings=settings) for m in members]
    for index, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        member.train()
        loss = torch.zeros((), dtype=source.dtype, device=source.device)
        for other, images in enumerate(distilled):
            if other != index:
                loss = loss + F.cross_entropy(member(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
