"""The attack core: attack = loss + step rule + projection, in one loop.

PGD and DVERGE's distillation are the same loop; they differ in the loss and its sign.
Images are float tensors `[N, C, H, W]` in `[0,1]`; eps and step sizes are in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]  # images -> loss of each image [N]; attacks raise it
StepRule = Callable[[Tensor], Tensor]  # gradient -> direction, both shaped like the images
Output = Callable[[Tensor], Tensor]  # images -> scores of each class [N, classes]


def ascend(
    loss: Loss,
    x0: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    rule: StepRule,
    start: Tensor | None = None,
) -> Tensor:
    """Return images in the Linf ball of radius `eps` around `x0` with a raised loss.

    Only the gradient on the images is computed; the model's parameters get none. `x0` is left as
    it was.

    Args:
        loss: per-image loss to raise.
        x0: clean images.
        rule: makes a direction of a gradient.
        start: where to begin inside the ball; `x0` by default.
    """
    x = x0 if start is None else start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x).sum(), x)
        x = project(x.detach() + step_size * rule(gradient), x0, eps)
    return x.detach()


def project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    """Return `x` moved into the Linf ball around `x0` and into the box `[0,1]`."""
    return torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)


def random_start(x0: Tensor, eps: float, draw: torch.Generator) -> Tensor:
    """Return a uniformly random point of the ball, cut to the box."""
    noise = torch.rand(x0.shape, generator=draw, device=x0.device, dtype=x0.dtype)
    return project(x0 + (2 * noise - 1) * eps, x0, eps)


def sign_rule() -> StepRule:
    """Return the steps of PGD (Madry et al., 2018): the gradient's sign."""
    return torch.sign


def momentum_rule(decay: float) -> StepRule:
    """Return the steps of MI-FGSM (Dong et al., 2018): the sign of the accumulated gradient.

    Each step's gradient is divided by its L1 norm per image before it is added. An image whose
    gradient is zero stays where it is instead of turning into NaN.
    """
    velocity: Tensor | None = None

    def direction(gradient: Tensor) -> Tensor:
        nonlocal velocity
        norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        unit = gradient / norm.clamp_min(torch.finfo(gradient.dtype).tiny)
        velocity = unit if velocity is None else decay * velocity + unit
        return velocity.sign()

    return direction


def cross_entropy(output: Output, labels: Tensor) -> Loss:
    """Return the cross-entropy of `output` (logits or log-probabilities) with the labels."""
    return lambda x: F.cross_entropy(output(x), labels, reduction="none")


def cw_margin(output: Output, labels: Tensor) -> Loss:
    """Return how far the best wrong class stands above the right one (Carlini & Wagner, 2017)."""

    def loss(x: Tensor) -> Tensor:
        scores = output(x)
        right = scores.gather(1, labels[:, None])[:, 0]
        wrong = scores.scatter(1, labels[:, None], -torch.inf).amax(1)
        return wrong - right

    return loss


def mean_logits_output(members: Sequence[nn.Module]) -> Output:
    """Return the mean of the members' logits, as the served graph computes it."""
    return lambda x: torch.stack([member(x) for member in members]).mean(0)


def mean_softmax_output(members: Sequence[nn.Module]) -> Output:
    """Return the log of the members' mean softmax, the combination of the paper's own code."""

    def output(x: Tensor) -> Tensor:
        logs = torch.stack([member(x).log_softmax(1) for member in members])
        return logs.logsumexp(0) - math.log(len(members))

    return output
