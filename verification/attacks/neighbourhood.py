"""Gradients averaged over random neighbours of the images, for attacks that transfer better.

Each function returns an `Estimate` for `pgd_loop` that serves one attack on one batch: what it
keeps from step to step belongs to those images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.pgd import Estimate, Loss, Norm, gradient, random_change


def variance_tuned(
    eps: float,
    draw: torch.Generator,
    *,
    samples: int = 20,
    reach: float = 1.5,
    norm: Norm = "linf",
) -> Estimate:
    """Return the gradient of VMI-FGSM (Wang & He, 2021): plus the variance seen one step before.

    The variance is the mean gradient of `samples` neighbours, drawn from the ball of radius
    `reach * eps` as random starts are, less the gradient itself. A linear loss has none.
    """
    variance: Tensor | None = None

    def estimate(loss: Loss, x: Tensor) -> Tensor:
        nonlocal variance
        here = gradient(loss, x)
        tuned = here if variance is None else here + variance
        around = torch.zeros_like(x)
        for _ in range(samples):
            around += gradient(loss, x + random_change(x, reach * eps, draw, norm))
        variance = around / samples - here
        return tuned

    return estimate


def norm_penalised(
    eps: float,
    draw: torch.Generator,
    *,
    step_size: float,
    samples: int = 20,
    reach: float = 3.0,
    balance: float = 0.5,
    norm: Norm = "linf",
) -> Estimate:
    """Return the gradient of PGN (Ge et al., 2023): of the loss less the norm of its gradient.

    It seeks flat maxima. The penalty's gradient is a finite difference: at each neighbour, drawn
    from the ball of radius `reach * eps`, the gradient there is mixed with the one found a step of
    `step_size` down the loss, with weights `1 - balance` and `balance`. A sample costs two
    gradients.
    """

    def estimate(loss: Loss, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(samples):
            near = x + random_change(x, reach * eps, draw, norm)
            here = gradient(loss, near)
            below = gradient(loss, near - step_size * _scaled(here, norm))
            total += (1 - balance) * here + balance * below
        return total / samples

    return estimate


def flatness_enhanced(
    eps: float,
    draw: torch.Generator,
    *,
    samples: int = 20,
    reach: float = 2.0,
    inner: float = 0.15,
    decay: float = 0.9,
    norm: Norm = "linf",
) -> Estimate:
    """Return the gradient of MEF (Qiu et al., 2024): the mean over neighbours that learn.

    Neighbour `k` is drawn from the ball of radius `reach * eps` and moved by `inner * eps * q_k`,
    where `q_k` follows the neighbour's own gradients from step to step:
    `q_k = g_k / mean|g_k| - decay * q_k`.
    """
    followed: list[Tensor] = []

    def estimate(loss: Loss, x: Tensor) -> Tensor:
        followed.extend(torch.zeros_like(x) for _ in range(samples - len(followed)))
        total = torch.zeros_like(x)
        for index, moved in enumerate(followed):
            near = x + random_change(x, reach * eps, draw, norm) + inner * eps * moved
            found = gradient(loss, near)
            followed[index] = _scaled(found, norm) - decay * moved
            total += found
        return total / samples

    return estimate


def _scaled(found: Tensor, norm: Norm) -> Tensor:
    """Return each image's gradient at mean absolute value 1, for L2 balls at length 1; or zero."""
    axes = (1, 2, 3)
    size = (
        found.abs().mean(axes, keepdim=True)
        if norm == "linf"
        else found.square().sum(axes, keepdim=True).sqrt()
    )
    return found / size.clamp_min(torch.finfo(found.dtype).tiny)
