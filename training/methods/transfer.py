"""Training on stored adversarial images of other networks (PubDef; Sitawarin et al., ICLR 2024).

Attacks that transfer from a few networks are much like those that transfer from others: who has
learnt from some resists the rest. White-box attacks are another matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from training.config import Config
from training.methods import Step, dverge
from training.methods.dverge_draws import draw_partners, layer_of
from training.methods.standard import descend
from training.methods.stored_images import StoredImages
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.parallel.topology import Batch, ProcessTopology


def make_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
    stored: StoredImages,
) -> Step:
    """Return the step of a run: `1/2 CE(clean) + 1/2 CE(adversarial)`, each member alone.

    Each member draws its own adversarial images. Both halves pass the network together: the
    statistics of its BatchNorm are those of what it will meet.
    """
    mine = topology.local_members(len(members))

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        when: list[int | str] = [config.seed, "transfer", epoch, number, *topology.seed_path]

        def update(index: int) -> Tensor:
            images, classes = clean_and_adversarial(stored, source, labels, *when, index)
            loss = F.cross_entropy(members[index].train()(images), classes)
            return descend([optimizers[index]], loss, topology)

        return torch.stack(side_by_side(update, mine, source.device))

    return step


def make_dverge_step(
    config: Config,
    members: Sequence[Member],
    optimizers: Sequence[SGD],
    topology: ProcessTopology,
    stored: StoredImages,
) -> Step:
    """Return the step of a run: DVERGE's loss, and that of `make_step` beside it."""

    def step(epoch: int, number: int, batch: Batch) -> Tensor:
        source, labels, _ = batch
        when: list[int | str] = [config.seed, "dverge", epoch, number, *topology.seed_path]
        return dverge.step(
            members,
            optimizers,
            *batch,
            layer=layer_of(config, members, epoch, number),
            partners=draw_partners(config, epoch, number),
            settings=config.dverge,
            adversary=lambda index, _: clean_and_adversarial(stored, source, labels, *when, index),
            topology=topology,
        )

    return step


def clean_and_adversarial(
    stored: StoredImages, source: Tensor, labels: Tensor, *seed_path: int | str
) -> tuple[Tensor, Tensor]:
    """Return a batch followed by as many stored adversarial images, and the labels of all.

    Args:
        stored: where they are drawn from.
        source, labels: the clean batch, `[B, C, H, W]` and `[B]`.
        seed_path: what is drawn (see `training.seeds`).
    """
    images, classes = stored.draw(len(labels), source.device, *seed_path)
    return torch.cat([source, images.to(source.dtype)]), torch.cat([labels, classes])
