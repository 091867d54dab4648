"""What transfer attacks add to PGD: input transformations and gradient estimates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.pgd import Estimate, Loss, Norm, gradient, random_change
from training.seeds import generator


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


def diverse_inputs(
    loss: Loss, draw: torch.Generator, *, probability: float = 0.5, grow: float = 1.25
) -> Loss:
    """Return the loss seen through random resizing and padding: DI2-FGSM (Xie et al., 2019).

    With `probability` a step's images are enlarged by a random factor up to `grow`, padded with
    zeros at a random place to the largest size (32 pixels become 40), and brought back to the
    size the network takes. One draw for all images of a step.
    """

    # Numbers that the host needs: drawn on a GPU, each would make the host wait for it.
    numbers = draw if draw.device.type == "cpu" else generator(draw.initial_seed())

    def uniform() -> float:
        return float(torch.rand((), generator=numbers))

    def diverse(x: Tensor) -> Tensor:
        if uniform() >= probability:
            return loss(x)
        height, width = x.shape[-2:]
        most = (round(height * grow), round(width * grow))
        share = uniform()
        size = [
            low + round(share * (high - low))
            for low, high in zip((height, width), most, strict=True)
        ]
        larger = F.interpolate(x, size=size, mode="nearest")
        top = int(uniform() * (most[0] - size[0] + 1))
        left = int(uniform() * (most[1] - size[1] + 1))
        padding = (left, most[1] - size[1] - left, top, most[0] - size[0] - top)
        padded = F.pad(larger, padding)
        back = F.interpolate(padded, size=(height, width), mode="bilinear", align_corners=False)
        return loss(back)

    return diverse
