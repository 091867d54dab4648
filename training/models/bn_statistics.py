"""BatchNorm statistics: the effect of a pass in training mode, repeated without the pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.models.member import Member


def features_and_statistics(
    member: Member, images: Tensor, layer: int
) -> tuple[Tensor, Callable[[], None]]:
    """Return features in training mode, and what repeats that pass's effect on BatchNorm.

    The statistics of the same images are the same each time, so a repeated pass is the closed
    form `running <- (1 - momentum) * running + momentum * batch`.

    Args:
        member: in training mode.
        images: `[B, C, H, W]`.
        layer: 1..depth.
    """
    norms = [
        module
        for module in member.modules_upto(layer)
        if isinstance(module, nn.BatchNorm2d) and module.training  # a frozen one keeps its own
    ]
    running = [tensor for norm in norms for tensor in _statistics(norm)[:2]]
    counts = [_statistics(norm)[2] for norm in norms]
    before = [tensor.clone() for tensor in (*running, *counts)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # running statistics become the batch's, exactly
    try:
        features = member(images, layer)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    of_batch = [tensor.clone() for tensor in running]
    for tensor, value in zip((*running, *counts), before, strict=True):
        tensor.copy_(value)
    # Momentum by momentum, all norms of one at once: on a GPU each operation is a launch.
    alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for number, momentum in enumerate(momenta):
        assert momentum is not None
        moving, still = alike.setdefault(momentum, ([], []))
        moving += running[2 * number : 2 * number + 2]
        still += of_batch[2 * number : 2 * number + 2]

    @torch.no_grad()
    def again() -> None:
        for momentum, (moving, still) in alike.items():
            torch._foreach_mul_(moving, 1 - momentum)
            torch._foreach_add_(moving, still, alpha=momentum)
        if counts:
            torch._foreach_add_(counts, 1)

    return features, again


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """Return BatchNorm's running mean, running variance and count of batches."""
    mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert count is not None
    return mean, variance, count
