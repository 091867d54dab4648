"""Adversarial training (Madry et al., 2018): each member alone, on PGD examples of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Optimizer

from training.config import Config
from training.methods import Step
from training.methods.standard import descend
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import SINGLE_PROCESS, Batch, ProcessTopology
from training.pgd import cross_entropy, pgd_loop, random_start, sign_rule
from training.schedules import Adversarial
from training.seeds import generator


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run; see `adversarial_step`."""

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        return adversarial_step(
            members,
            optimizers,
            source,
            labels,
            settings=config.adversarial,
            seed_path=(config.seed, "adversarial", epoch, number, *topology.seed_path),
            topology=topology,
        )

    return step


def adversarial_images(
    member: Member,
    source: Tensor,
    labels: Tensor,
    settings: Adversarial,
    *seed_path: int | str,
) -> Tensor:
    """Return PGD examples made on `member` itself (Madry et al., 2018), from a random start.

    Args:
        member: attacked in evaluation mode; left in training mode.
        source: clean images.
        labels: their classes.
        settings: radius and steps.
        seed_path: what the random start is drawn for (see `training.seeds`).
    """
    member.eval()
    draw = generator(*seed_path, device=source.device)
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
    seed_path: Sequence[int | str],
    topology: ProcessTopology = SINGLE_PROCESS,
) -> Tensor:
    """Train each member alone on PGD examples of its own (Madry et al., 2018, eq. 2.1)."""

    def update(index: int) -> Tensor:
        member = members[index]
        made = adversarial_images(member, source, labels, settings, *seed_path, index)
        return descend(optimizers[index], F.cross_entropy(member(made), labels), topology)

    return torch.stack(side_by_side(update, topology.local_members(len(members)), source.device))
