"""DVERGE (Yang et al., NeurIPS 2020): diversify the members' non-robust features.

Reads like the paper: `distill` is equation 1, `step` is one update of equation 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from training.attacks import ascend, momentum_rule
from training.config import Dverge
from training.members import Member


def distill(
    member: Member, source: Tensor, target: Tensor, *, layer: int, settings: Dverge
) -> Tensor:
    """Return images that look like `source` and that `member` sees as `target` (eq. 1).

    `argmin_z || f_l(z) - f_l(x_t) ||^2` subject to `|| z - x_s ||_inf <= eps` and the box, by
    sign steps on a momentum-accumulated gradient, no random start. The target's features are
    computed once. With `batchnorm = "batch"` the member is in training mode, and its running
    statistics move just as if the target had passed through it at every step.

    Args:
        member: the network; its mode is changed, its parameters are not.
        source, target: float `[B, C, H, W]` in `[0,1]`.
        layer: 1..depth, features before ReLU.

    Returns:
        distilled images, shaped like `source`.
    """
    member.train(settings.batchnorm == "batch")
    with torch.no_grad():
        if settings.batchnorm == "batch":
            features, pass_target_again = _features_and_statistics(member, target, layer)
        else:
            features, pass_target_again = member(target, layer), lambda: None

    def closeness(z: Tensor) -> Tensor:
        found = member(z, layer)
        pass_target_again()
        return -(found - features).pow(2).flatten(1).mean(1)

    return ascend(
        closeness,
        source,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=settings.steps,
        rule=momentum_rule(settings.decay),
    )


def member_loss(member: Member, index: int, distilled: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return `sum_{j != i} CE(f_i(x'_{f_j,l}), y_s)` (eq. 3), a scalar.

    The others' images pass one after the other: each set has its own BatchNorm statistics.
    """
    losses = [
        F.cross_entropy(member(images), labels)
        for other, images in enumerate(distilled)
        if other != index
    ]
    return torch.stack(losses).sum()


def step(
    members: Sequence[Member],
    optimizers: Sequence[Optimizer],
    source: Tensor,
    labels: Tensor,
    target: Tensor,
    *,
    layer: int,
    settings: Dverge,
) -> Tensor:
    """Make one DVERGE step: all distil, then each member learns from the others' images.

    Args:
        members: at least two, updated in place.
        optimizers: one for each member.
        source, labels: a batch `[B, C, H, W]` and its classes `[B]`.
        target: an independent batch, shaped like `source`.
        layer: drawn for this step.

    Returns:
        each member's loss, detached, `[members]`.
    """
    distilled = [
        distill(member, source, target, layer=layer, settings=settings) for member in members
    ]
    losses = []
    for index, (member, optimizer) in enumerate(zip(members, optimizers, strict=True)):
        member.train()
        loss = member_loss(member, index, distilled, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def standard_step(
    members: Sequence[Member], optimizers: Sequence[Optimizer], source: Tensor, labels: Tensor
) -> Tensor:
    """Make one step of ordinary training: each member alone, cross-entropy on clean images.

    Returns:
        each member's loss, detached, `[members]`.
    """
    losses = []
    for member, optimizer in zip(members, optimizers, strict=True):
        member.train()
        loss = F.cross_entropy(member(source), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _features_and_statistics(
    member: Member, images: Tensor, layer: int
) -> tuple[Tensor, Callable[[], None]]:
    """Return features in training mode, and what repeats that pass's effect on BatchNorm.

    The statistics of the same images are the same each time, so a repeated pass is the closed
    form `running <- (1 - momentum) * running + momentum * batch`.
    """
    norms = [module for module in member.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [
        (n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone(), n.momentum)
        for n in norms
        if n.running_mean is not None
        and n.running_var is not None
        and n.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.momentum = 1.0  # running statistics become the batch's, exactly
    features = member(images, layer)
    moved: list[tuple[nn.BatchNorm2d, Tensor, Tensor, float]] = []
    for norm, (mean, variance, count, momentum) in zip(norms, before, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert momentum is not None
        if not torch.equal(norm.num_batches_tracked, count):
            moved.append((norm, norm.running_mean.clone(), norm.running_var.clone(), momentum))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.copy_(count)
        norm.momentum = momentum

    @torch.no_grad()
    def again() -> None:
        for norm, mean, variance, momentum in moved:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            norm.running_var.mul_(1 - momentum).add_(variance, alpha=momentum)
            norm.num_batches_tracked.add_(1)

    return features, again
