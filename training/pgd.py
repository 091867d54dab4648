"""The attack core: attack = loss + step rule + projection, in one loop.

PGD and DVERGE's distillation are the same loop; they differ in the loss and its sign.
Images are float tensors `[N, C, H, W]` in `[0,1]`; eps and step sizes are in the same units, the
Linf or L2 norm of the whole image's change.

A loss of your own is any function from images to one number an image, which the attack raises; a
step rule of your own, any function from a gradient to a direction:

    def margin(x):
        logits = ensemble(x)
        return -logits.gather(1, labels[:, None]).squeeze(1)

    adversarial = pgd_loop(margin, x0, eps=0.03, step_size=0.003, steps=10)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor], Tensor]  # images -> loss of each image [N]; attacks raise it
Estimate = Callable[[Loss, Tensor], Tensor]  # loss, images -> gradient, shaped like the images
StepRule = Callable[[Tensor], Tensor]  # gradient -> direction, both shaped like the images
Output = Callable[[Tensor], Tensor]  # images -> scores of each class [N, classes]


def gradient(loss: Loss, x: Tensor) -> Tensor:
    """Return the gradient of the per-image loss at `x`; the model's parameters get none.

    It is zero where no path of differentiable operations leads from `x` to the loss.
    """
    x = x.detach().requires_grad_()
    total = loss(x).sum()
    if not total.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(total, x, materialize_grads=True)
    return found


def pgd_loop(
    loss: Loss,
    x0: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    rule: StepRule | None = None,
    start: Tensor | None = None,
    estimate: Estimate = gradient,
    norm: Norm = "linf",
) -> Tensor:
    """Return images in the ball of radius `eps` around `x0` with a raised loss.

    Only the gradient on the images is computed; the model's parameters get none. `x0` is left as
    it was.

    Args:
        loss: per-image loss to raise, `[N]` for images `[N, C, H, W]`: yours, or `cross_entropy`.
        x0: clean images.
        rule: from a gradient to a direction: yours or `momentum_rule(...)`; by default `normalize`.
        start: where to begin inside the ball; `x0` by default.
        estimate: from the loss and images to a gradient; by default the gradient itself.
        norm: of the ball; the rule should be of the same.
    """
    x = x0 if start is None else start
    rule = rule or partial(normalize, norm=norm)
    for _ in range(steps):
        direction = rule(estimate(loss, x))
        x = project(x.detach() + step_size * direction, x0, eps, norm)
    return x.detach()


def project(x: Tensor, x0: Tensor, eps: float, norm: Norm = "linf") -> Tensor:
    """Return `x` moved into the ball around `x0` and into the box `[0,1]`."""
    if norm == "linf":
        return torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
    delta = x - x0
    length = _length(delta)
    # Cutting to the box only shortens the way from x0, which lies in it.
    return (x0 + delta * (eps / length.clamp_min(eps))).clamp(0, 1)


def random_start(x0: Tensor, eps: float, draw: torch.Generator, norm: Norm = "linf") -> Tensor:
    """Return a uniformly random point of the ball, cut to the box."""
    return project(x0 + random_change(x0, eps, draw, norm), x0, eps, norm)


def random_change(x0: Tensor, eps: float, draw: torch.Generator, norm: Norm = "linf") -> Tensor:
    """Return a uniformly random point of the ball around zero, shaped like `x0`."""
    if norm == "linf":
        noise = torch.rand(x0.shape, generator=draw, device=x0.device, dtype=x0.dtype)
        return (2 * noise - 1) * eps
    noise = torch.randn(x0.shape, generator=draw, device=x0.device, dtype=x0.dtype)
    share = torch.rand((len(x0), 1, 1, 1), generator=draw, device=x0.device, dtype=x0.dtype)
    radius = eps * share ** (1 / x0[0].numel())
    return noise * radius / _length(noise)


def normalize(gradient: Tensor, norm: Norm = "linf") -> Tensor:
    """Return the steepest direction in a norm: the sign, or the gradient at L2 length 1.

    These are the steps of PGD (Madry et al., 2018). A gradient of zero stays zero.
    """
    return gradient.sign() if norm == "linf" else gradient / _length(gradient)


def momentum_rule(momentum: float, norm: Norm = "linf") -> StepRule:
    """Return the steps of MI-FGSM (Dong et al., 2018): along the accumulated gradient.

    Each step's gradient is divided by its L1 norm per image before it is added. An image whose
    gradient is zero stays where it is instead of turning into NaN.
    """
    velocity: Tensor | None = None

    def direction(gradient: Tensor) -> Tensor:
        nonlocal velocity
        unit = unit_l1(gradient)
        velocity = unit if velocity is None else momentum * velocity + unit
        return normalize(velocity, norm)

    return direction


def unit_l1(gradient: Tensor) -> Tensor:
    """Return each image's gradient divided by its L1 norm; one of zero stays zero."""
    size = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
    return gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)


def cross_entropy(output: Output, labels: Tensor) -> Loss:
    """Return the cross-entropy of `output` (logits or log-probabilities) with the labels."""
    return lambda x: F.cross_entropy(output(x), labels, reduction="none")


def member_logits(members: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return every member's logits, `[members, N, classes]`."""
    return torch.stack([member(x) for member in members])


def _length(images: Tensor) -> Tensor:
    """Return each image's L2 norm, `[N, 1, 1, 1]`, never zero."""
    length = images.square().sum((1, 2, 3), keepdim=True).sqrt()
    return length.clamp_min(torch.finfo(images.dtype).tiny)
