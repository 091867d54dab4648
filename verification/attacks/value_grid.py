"""Attacks on the values that the data itself uses.

Images with fewer levels than 8 bits have (scanned digits with 17 greys, drawings, masks) let a
defence tell clean images from attacked ones by their values alone: it handles the others in a way
that no attack gets through, and a caller who sends images with the data's own levels walks past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dverge_serve.errors import UserError
from training import pgd
from training.pgd import Norm
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.perturbation import uint8_steps

COARSE = 128  # levels of 256; with more, rounding to 8 bits is already the data's own grid


@dataclass(frozen=True, kw_only=True)
class GridAttack(GradientAttack, kind="grid"):
    """PGD whose every iterate lies on a grid of values, inside the ball.

    The steps add up off the grid; gradients are taken on it. Of all iterates, the one with the
    largest loss is kept.

    Args:
        levels: the values, 8-bit, rising; those of the images that are attacked.
    """

    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._samples or self.diversity or self.skip_gamma != 1:
            raise UserError(
                f"the attack '{self.name}' changes gradients", "those on the grid alone"
            )
        self.check("norm", ["linf"])
        if len(self.levels) < 2:
            raise UserError(f"the attack '{self.name}' has levels {self.levels}", "two or more")

    def _batch(
        self,
        members: Sequence[nn.Module],
        x0: Tensor,
        labels: Tensor,
        eps: float,
        draw: torch.Generator,
    ) -> Tensor:
        grid = torch.tensor(self.levels, dtype=torch.float32, device=x0.device) / 255
        reach = uint8_steps(eps) / 255 + 1e-6
        lowest, highest = self._within(grid, x0, reach)
        if bool((lowest == highest).all()):  # no other level within reach
            return x0
        middles = (grid[1:] + grid[:-1]) / 2

        def rounded(x: Tensor) -> Tensor:
            nearest = torch.searchsorted(middles, x.contiguous())
            return grid[torch.minimum(torch.maximum(nearest, lowest), highest)]

        best, most = x0, torch.full_like(labels, -torch.inf, dtype=x0.dtype)

        def keep(at: Tensor, values: Tensor) -> None:
            nonlocal best, most
            better = values > most
            best = torch.where(better.view(-1, 1, 1, 1), at, best)
            most = torch.where(better, values, most)

        def estimate(loss: pgd.Loss, x: Tensor) -> Tensor:
            at = rounded(x)

            def noted(x: Tensor) -> Tensor:
                values = loss(x)
                keep(at, values.detach())
                return values

            return pgd.gradient(noted, at)

        loss = self.loss_on(members, labels)
        last = rounded(self._climb(loss, x0, eps, self._start(x0, eps, draw), estimate))
        with torch.no_grad():
            keep(last, loss(last))
        return best

    def _within(self, grid: Tensor, x0: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """Return the first and the last place on the grid that each pixel may take."""
        lowest = torch.searchsorted(grid, x0 - reach)
        return lowest, torch.searchsorted(grid, x0 + reach, right=True) - 1


@dataclass(frozen=True, kw_only=True)
class InkAttack(GridAttack, kind="ink"):
    """`GridAttack` that leaves the background of each image as it is: all that has no ink.

    A defence that takes images with a spotted background for attacked ones handles these in a way
    that no attack gets through.
    """

    def _within(self, grid: Tensor, x0: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        lowest, highest = super()._within(grid, x0, reach)
        empty = x0 <= grid[0] + 1e-6
        return lowest.masked_fill(empty, 0), highest.masked_fill(empty, 0)


def coarse_levels(images: Tensor) -> tuple[int, ...]:
    """Return the values of uint8 images if they are coarser than 8 bits, else none."""
    levels = torch.bincount(images.flatten().cpu().int(), minlength=256).nonzero().flatten()
    return tuple(levels.tolist()) if 1 < len(levels) <= COARSE else ()


def grid_attacks(
    levels: tuple[int, ...], surrogates: Sequence[str], norm: Norm
) -> list[GridAttack]:
    """Return the attacks on the data's own values: white-box, and from the largest surrogate.

    Each is run on all pixels, and on those alone that are no background.

    Args:
        levels: of the data, by `coarse_levels`; without any there are no such attacks.
        surrogates: names of the sources of transfer attacks; the last is used.
        norm: of the ball; there are none in L2.
    """
    if not levels or norm != "linf":
        return []
    white_box = GridAttack(
        name="pgd-cw on the data's own values",
        threat="white_box",
        source="target",
        loss="cw",
        steps=10,
        skip_broken=True,
        control=False,
        levels=levels,
    )
    chosen = [white_box] + [
        replace(
            white_box,
            name=f"mpgd-cw on the data's own values from {source}",
            threat="transfer",
            source=source,
            momentum=1.0,
            steps=5,
            rel_stepsize=0.4,
            control=True,
        )
        for source in surrogates[-1:]
    ]
    return chosen + [
        InkAttack(**vars(each) | {"name": each.name.replace("own values", "own values, in ink")})
        for each in chosen
    ]
