"""Adversarial training (Madry et al., 2018): each member alone, on PGD examples of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from training.config import Config
from training.methods import Step
from training.methods.overlap import each_alone
from training.methods.standard import descend
from training.models.member import Member
from training.parallel.topology import Batch, ProcessTopology
from training.pgd import cross_entropy, pgd_loop, random_start
from training.schedules import Adversarial, Transfer
from training.seeds import generator


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
) -> Step:
    """Return the step of a run: each member learns from its own PGD images (eq. 2.1)."""
    mine = topology.local_members(len(members))

    def update(index: int, epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        seed_path: list[int | str] = [config.seed, "adversarial", epoch, number]
        images = adversarial_images(
            members[index],
            source,
            labels,
            config.adversarial,
            *seed_path,
            *topology.seed_path,
            index,
        )
        loss = F.cross_entropy(members[index](images), labels)
        return descend([optimizers[index]], loss, topology)

    return each_alone(update, mine)


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
    made = pgd_examples(member.eval(), source, labels, settings, *seed_path)
    member.train()
    return made


def pgd_examples(
    network: Member,
    source: Tensor,
    labels: Tensor,
    settings: Adversarial | Transfer,
    *seed_path: int | str,
) -> Tensor:
    """Return PGD examples made on a network as it is, from a random start.

    Args:
        network: attacked; its mode does not change.
        source: clean images.
        labels: their classes.
        settings: radius and steps.
        seed_path: what the random start is drawn for (see `training.seeds`).
    """
    draw = generator(*seed_path, device=source.device)
    return pgd_loop(
        cross_entropy(network, labels),
        source,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        start=random_start(source, settings.eps, draw),
    )
