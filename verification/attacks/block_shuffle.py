"""Block shuffle and rotation: what BSR shows a surrogate instead of the image."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from training.pgd import Estimate, Loss, gradient


def block_shuffled(
    draw: torch.Generator, *, copies: int = 20, blocks: int = 2, degrees: float = 24.0
) -> Estimate:
    """Return the gradient of BSR (Wang et al., 2024): the mean over shuffled and rotated copies.

    Args:
        draw: of every random number.
        copies: how many gradients a step takes.
        blocks: pieces that an image is cut into along each axis.
        degrees: largest angle of a strip's rotation, either way.
    """

    def estimate(loss: Loss, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(copies):
            total += gradient(lambda x: loss(shuffle_blocks(x, draw, blocks, degrees)), x)
        return total / copies

    return estimate


def shuffle_blocks(x: Tensor, draw: torch.Generator, blocks: int, degrees: float) -> Tensor:
    """Return images `[N, C, H, W]` cut into strips, each rotated, cut across, all put in disorder.

    Strips run along a random axis; where the cuts fall, the angles and the orders are drawn once
    for all images.
    """
    first = 2 + int(torch.randint(2, (), generator=draw, device=draw.device))
    strips = [
        torch.cat(_pieces(_rotated(strip, draw, degrees), draw, blocks, 5 - first), 5 - first)
        for strip in _pieces(x, draw, blocks, first)
    ]
    return torch.cat(strips, first)


def _pieces(x: Tensor, draw: torch.Generator, blocks: int, axis: int) -> list[Tensor]:
    """Return the image cut at random places along an axis, in random order."""
    shares = torch.rand(blocks, generator=draw, device=draw.device).clamp_min(1e-3).tolist()
    whole = sum(shares)
    ends = [round(x.shape[axis] * end / whole) for end in accumulate(shares)]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    pieces = torch.split(x, lengths, axis)
    order = torch.randperm(blocks, generator=draw, device=draw.device).tolist()
    return [pieces[index] for index in order]


def _rotated(x: Tensor, draw: torch.Generator, degrees: float) -> Tensor:
    """Return images turned around their middle by one random angle; what comes in is black."""
    share = float(torch.rand((), generator=draw, device=draw.device))
    angle = math.radians(degrees * (2 * share - 1))
    height, width = x.shape[-2:]
    if not height or not width:
        return x
    cosine, sine = math.cos(angle), math.sin(angle)
    # In grid units, where both axes run from -1 to 1 whatever the strip's shape.
    turn = torch.tensor(
        [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]],
        dtype=x.dtype,
        device=x.device,
    )
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
