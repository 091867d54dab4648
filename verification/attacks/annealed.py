"""Momentum PGD whose steps fall to almost nothing: for scores that go up and down in fine steps.

A defence that rounds its input, or something made of it, leaves a gradient whose sign changes from
one point to the next. Auto-PGD takes that for a lack of progress, and halves its step too early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training import pgd
from verification.attacks.apgd import AdaptivePGD, RowLoss, recorded_gradient
from verification.attacks.best_images import BestImages

MOMENTUM = 0.75
FIRST = 0.5  # of eps: the size of the first step
LAST = 1 / 512  # of the pixel range: half a grey level


@dataclass(frozen=True, kw_only=True)
class AnnealedPGD(AdaptivePGD, kind="annealed"):
    """MI-FGSM (Dong et al., 2018) with a step that falls as a cosine, from a random start.

    What is scored and kept, and which images go on, are as in `AdaptivePGD`.
    """

    def climb(self, best: BestImages, loss: RowLoss, rows: Tensor, x: Tensor, steps: int) -> None:
        """Follow the accumulated gradient; images that are done drop out. See `apgd.climb`."""
        velocity = torch.zeros_like(x)
        for step in range(steps):
            if not len(rows):
                return
            gradient, _ = recorded_gradient(best, loss, rows, x)
            left = ~best.done[rows]
            rows, x, velocity, gradient = (each[left] for each in (rows, x, velocity, gradient))
            velocity = MOMENTUM * velocity + pgd.unit_l1(gradient)
            size = best.eps * FIRST * (1 + math.cos(math.pi * step / steps)) / 2 + LAST
            ahead = x + size * pgd.normalize(velocity, best.norm)
            x = pgd.project(ahead, best.clean[rows], best.eps, best.norm)
        with torch.no_grad():
            best.record(rows, x, best.model(x))
