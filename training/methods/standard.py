"""Ordinary training, and what every method's step ends with: the optimiser's.

Steps take `source` float `[B, C, H, W]` in `[0,1]` and `labels` `[B]`, update the members in place
and return the loss of each of this process's members, detached, `[members]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import ALONE, Team


def descend(optimizer: Optimizer, loss: Tensor, team: Team = ALONE) -> Tensor:
    """Take one optimiser step down `loss` and return it, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    team.average(optimizer)
    optimizer.step()
    return loss.detach()


def standard_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    team: Team = ALONE,
) -> Tensor:
    """Make one step of ordinary training: each member alone, cross-entropy on clean images.

    Returns:
        the loss of each of this process's members, detached, `[members]`.
    """

    def update(index: int) -> Tensor:
        member = members[index].train()
        return descend(optimizers[index], F.cross_entropy(member(source), labels), team)

    return torch.stack(side_by_side(update, team.mine(len(members)), source.device))


def descend_together(optimizers: Sequence[Optimizer], loss: Tensor, team: Team) -> None:
    """Take one step of all optimisers down a loss that the members share."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        team.average(optimizer)
        optimizer.step()
