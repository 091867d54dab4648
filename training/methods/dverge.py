"""DVERGE (Yang et al., NeurIPS 2020): diversify the members' non-robust features.

Reads like the paper: `distill` is equation 1, `step` is one update of equation 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from training.methods.dverge_draws import all_others
from training.methods.standard import descend
from training.models.bn_statistics import features_and_statistics
from training.models.member import Member
from training.parallel.cuda_graphs import Work
from training.parallel.threads import one_thread_inside, side_by_side
from training.parallel.topology import SINGLE_PROCESS, ProcessTopology
from training.pgd import momentum_rule, pgd_loop
from training.schedules import Dverge

PART = 64  # images that one thread distils at a time

# index, member -> images it learns from besides, e.g. its own adversarial ones, and their labels
Adversary = Callable[[int, Member], tuple[Tensor, Tensor]]


def distill(
    member: Member, source: Tensor, target: Tensor, *, layer: int, settings: Dverge
) -> Tensor:
    """Return images that look like `source` and that `member` sees as `target` (eq. 1).

    `argmin_z || f_l(z) - f_l(x_t) ||^2` subject to `|| z - x_s ||_inf <= eps` and the box, by
    sign steps on a momentum-accumulated gradient, no random start. The target's features are
    computed once. With `batchnorm = "batch"` the member is in training mode, and its running
    statistics move just as if the target had passed through it at every step.

    Args:
        member: the network; its mode may change, its parameters do not.
        source, target: float `[B, C, H, W]` in `[0,1]`.
        layer: 1..depth, features before ReLU.

    Returns:
        distilled images, shaped like `source`.
    """
    (distilled,) = distill_all([member], source, target, layer=layer, settings=settings)
    return distilled


def distill_all(
    members: Sequence[Member],
    source: Tensor,
    target: Tensor,
    *,
    layer: int,
    settings: Dverge,
    deepest: int = 0,
) -> list[Tensor]:
    """Return what each member distils (see `distill`), computed side by side.

    With running statistics an image's distillation depends on no other image, so members work
    through the batch in parts, which fill the cores evenly; the parts' size depends on nothing
    else, so neither do the images.

    Args:
        layer: 1..the deepest member's depth; a shallower member takes the layer at the same share
            of its own depth.
        deepest: that depth, where the deepest member is not among these.
    """
    deepest = deepest or max(member.depth for member in members)
    layers = [member.layer_at(layer, deepest) for member in members]
    with one_thread_inside():  # of many operations on few numbers
        models = [ready(each, settings) for each in members]
    rows = _parts(source, settings)

    def distilled_by(part: tuple[int, slice]) -> Tensor:
        index, own = part
        return _distill(models[index], source[own], target[own], layers[index], settings)

    parts = [(index, own) for index in range(len(members)) for own in rows]
    made = side_by_side(distilled_by, parts, source.device)
    return [torch.cat(made[start : start + len(rows)]) for start in range(0, len(made), len(rows))]


def ready(member: Member, settings: Dverge) -> Member:
    """Return what distils for a member: itself in training mode, or its frozen copy."""
    return member.train() if settings.batchnorm == "batch" else member.frozen()


def distill_in_parts(
    model: Member, source: Tensor, target: Tensor, layer: int, settings: Dverge
) -> Tensor:
    """Return what a member that is `ready` distils, in the parts that `distill_all` makes."""
    rows = _parts(source, settings)
    return torch.cat([_distill(model, source[own], target[own], layer, settings) for own in rows])


def _parts(source: Tensor, settings: Dverge) -> list[slice]:
    """Return the rows that are distilled at a time."""
    whole = settings.batchnorm == "batch" or source.device.type != "cpu"
    size = max(len(source), 1) if whole else PART
    return [slice(start, start + size) for start in range(0, len(source), size)]


def _distill(
    member: Member, source: Tensor, target: Tensor, layer: int, settings: Dverge
) -> Tensor:
    """Distil with a member that is in the mode its statistics ask for."""
    with torch.no_grad():
        if settings.batchnorm == "batch":
            features, pass_target_again = features_and_statistics(member, target, layer)
        else:
            features, pass_target_again = member(target, layer), lambda: None

    def closeness(z: Tensor) -> Tensor:
        apart: Tensor = member(z, layer) - features
        return -apart.pow(2).flatten(1).mean(1)

    momentum = momentum_rule(settings.decay)

    def rule(gradient: Tensor) -> Tensor:
        pass_target_again()  # only now: the backward pass needs the statistics it was begun with
        return momentum(gradient)

    return pgd_loop(
        closeness,
        source,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        rule=rule,
    )


def member_loss(member: Member, learned: Sequence[Tensor], labels: Tensor, others: int) -> Tensor:
    """Return `sum_{j != i} CE(f_i(x'_{f_j,l}), y_s)` (eq. 3), or its estimate, a scalar.

    The partners' images pass one after the other: each set has its own BatchNorm statistics.

    Args:
        learned: what the member's partners distilled.
        others: how many other members there are; where fewer are partners, these stand for all.
    """
    losses = [F.cross_entropy(member(images), labels) for images in learned]
    return torch.stack(losses).sum() * (others / len(learned))


def step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    settings: Dverge,
    partners: Sequence[Sequence[int]] | None = None,
    adversary: Adversary | None = None,
    topology: ProcessTopology = SINGLE_PROCESS,
    parts: Sequence[Work] | None = None,
) -> Tensor:
    """Make one DVERGE step: all distil, then each member learns from its partners' images.

    Args:
        members: at least two, updated in place.
        optimizers: one for each member.
        source, labels: a batch `[B, C, H, W]` and its classes `[B]`.
        target: an independent batch, shaped like `source`.
        layer: drawn for this step, 1..the deepest member's depth; a shallower member takes the
            layer at the same share of its own depth.
        partners: for each member, those whose images it learns from; none: all the others.
        adversary: gives a member more to learn from, for DVERGE+AdvT its own adversarial images:
            `weight * (the sum) + CE(f_i(x_adv), y)` (paper, section 4.4).
        topology: of the processes that train the members; each trains its own.
        parts: its `halves`, where they are recorded.

    Returns:
        the loss of each of this process's members, detached, `[members]`.
    """
    distil, update = parts or halves(
        members, optimizers, settings=settings, adversary=adversary, topology=topology
    )
    made = topology.exchange(distil(layer, (source, target)), len(members))
    partners = partners or all_others(len(members))
    mine = topology.local_members(len(members))
    learned = (made[other] for index in mine for other in partners[index])
    (losses,) = update(0, (source, labels, *learned))
    return losses


def halves(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    *,
    settings: Dverge,
    adversary: Adversary | None = None,
    topology: ProcessTopology = SINGLE_PROCESS,
) -> tuple[Work, Work]:
    """Return the halves of a step, see `step`; between them processes exchange images.

    Returns:
        what distils, given a layer, source and target: what each of this process's members makes;
        what updates, given any layer, source, labels and, for each of this process's members in
        turn, the images of its partners: the losses.
    """
    mine = topology.local_members(len(members))

    def distil(layer: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        source, target = inputs
        return distill_all(
            [members[index] for index in mine],
            source,
            target,
            layer=layer,
            settings=settings,
            deepest=max(member.depth for member in members),
        )

    def update(_: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        source, labels, *images = inputs
        drawn = len(images) // len(mine)

        def learn_at(place: int) -> Tensor:
            learned = images[place * drawn : (place + 1) * drawn]
            return learn(mine[place], source, learned, labels)

        return [torch.stack(side_by_side(learn_at, range(len(mine)), labels.device))]

    learn = learner(members, optimizers, settings, adversary, topology)
    return distil, update


def learner(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    settings: Dverge,
    adversary: Adversary | None,
    topology: ProcessTopology,
) -> Callable[[int, Tensor, Sequence[Tensor], Tensor], Tensor]:
    """Return what updates one member: index, source, partners' images, labels -> its loss."""

    def learn(index: int, source: Tensor, learned: Sequence[Tensor], labels: Tensor) -> Tensor:
        member = members[index].train()
        # Made before the member learns anything: learning moves its BatchNorm statistics.
        own = None if adversary is None else adversary(index, member)
        loss = member_loss(member, learned, labels, len(members) - 1)
        if settings.clean_weight:
            loss = loss + settings.clean_weight * F.cross_entropy(member(source), labels)
        if own is not None:
            loss = settings.weight * loss + F.cross_entropy(member(own[0]), own[1])
        return descend([optimizers[index]], loss, topology)

    return learn
