"""Adversarial training (Madry et al., 2018): each member alone, on PGD examples of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from training.attacks import cross_entropy, pgd_loop, random_start, sign_rule
from training.config import Adversarial
from training.methods.standard import descend
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import ALONE, Team
from training.seeds import generator


def adversarial_images(
    member: Member,
    source: Tensor,
    labels: Tensor,
    settings: Adversarial,
    *names: int | str,
) -> Tensor:
    """Return PGD examples made on `member` itself (Madry et al., 2018), from a random start.

    Args:
        member: attacked in evaluation mode; left in training mode.
        source: clean images.
        labels: their classes.
        settings: radius and steps.
        names: what the random start is drawn for (see `training.seeds`).
    """
    member.eval()
    draw = generator(*names, device=source.device)
    made = pgd_loop(
        cross_entropy(member, labels),
        source,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        rule=sign_rule(),
        start=random_start(source, settings.eps, draw),
    )
    member.train()
    return made


def adversarial_step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    *,
    settings: Adversarial,
    names: Sequence[int | str],
    team: Team = ALONE,
) -> Tensor:
    """Train each member alone on PGD examples of its own (Madry et al., 2018, eq. 2.1)."""

    def update(index: int) -> Tensor:
        member = members[index]
        made = adversarial_images(member, source, labels, settings, *names, index)
        return descend(optimizers[index], F.cross_entropy(member(made), labels), team)

    return torch.stack(side_by_side(update, team.mine(len(members)), source.device))
