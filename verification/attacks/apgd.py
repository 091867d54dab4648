"""Auto-PGD (Croce & Hein, 2020): PGD whose step size follows its progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor

from training import pgd
from training.models.ensemble import Ensemble
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.attack import Attack, Crafted, Model
from verification.attacks.batches import in_slices
from verification.attacks.best_images import BestImages
from verification.attacks.gradient_attack import LOSSES, members_of

ApgdLoss = Literal["ce", "cw", "dlr", "targeted"]
RowLoss = Callable[[Tensor, Tensor], Tensor]  # scores [n, classes], rows [n] -> loss [n]
MOMENTUM = 0.75  # alpha of the paper's step
RISING = 0.75  # rho: the share of steps that must raise the loss
NEAREST = 0.25  # share of the standing images that the longer climbs go on with


@dataclass(frozen=True, kw_only=True)
class AdaptivePGD(Attack, kind="apgd"):
    """Auto-PGD on the members' mean logits, from a random start.

    Every iterate is scored; one that is answered wrongly, or came nearer than all before, is also
    scored rounded to 8 bits. An image that is clearly wrong in 8 bits is done and costs nothing
    more: rounded inward it lies in the ball of floats, too. The others break from another start,
    if at all, and mostly where the margin is small. So a second, longer climb begins anew on the
    quarter of them with the largest margins.

    Args:
        loss: the loss to raise: `ce`, `cw`, `dlr`, which needs three classes, or `targeted`: the
            targeted DLR, which needs four.
        steps: gradient steps of the first climb, for each target.
        nearest_steps: of the second; 0 leaves it out.
        targets: how many wrong classes `targeted` tries, the likeliest first.
    """

    loss: ApgdLoss = "ce"
    steps: int = 100
    nearest_steps: int = 0
    targets: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("loss", get_args(ApgdLoss))

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image; see `Attack.run`."""
        ensemble = Ensemble(members_of(model)).eval()
        best = BestImages(ensemble, images, labels, eps, self.norm)
        climbs = [(1.0, self.steps), (NEAREST, self.nearest_steps)]
        goals = self._losses(best)
        for number, ((share, steps), loss) in enumerate(product(climbs, goals)):
            if steps:
                self._climb_all(best, loss, best.nearest(share), steps, (*seed, number))
        return Crafted(best.images)

    def climb(self, best: BestImages, loss: RowLoss, rows: Tensor, x: Tensor, steps: int) -> None:
        """Run Auto-PGD (algorithm 1) on some images; those that are done drop out.

        Args:
            best: scores the iterates and keeps the best ones.
            loss: to raise; it is given the scores of some rows, and which they are.
            rows: int64 `[n]`: the images.
            x: where each begins, `[n, C, H, W]` in the ball.
            steps: gradient steps.
        """
        climb(best, loss, rows, x, steps)

    def _climb_all(
        self,
        best: BestImages,
        loss: RowLoss,
        rows: Tensor,
        steps: int,
        seed_path: tuple[int | str, ...],
    ) -> None:
        """Climb with some images from random starts, a batch at a time."""

        def batch(part: slice) -> None:
            draw = generator(*seed_path, part.start, device=rows.device)
            start = pgd.random_start(best.clean[rows[part]], best.eps, draw, best.norm)
            self.climb(best, loss, rows[part], start, steps)

        in_slices(batch, len(rows), best.clean)

    @property
    def work(self) -> int:
        """Passes through the source, for progress."""
        return round(self.steps + NEAREST * self.nearest_steps) * self.targets

    def _losses(self, best: BestImages) -> list[RowLoss]:
        """Return the losses to climb, one for each target."""
        labels = best.labels
        if self.loss != "targeted":
            loss = LOSSES[self.loss]
            return [lambda scores, rows: loss(lambda same: same, labels[rows])(scores)]
        likeliest = best.likeliest_wrong()[:, : self.targets]
        return [partial(_targeted, labels, targets) for targets in likeliest.T]


@dataclass
class Climb:
    """The images that a climb still moves, a row for each; its fields are the paper's symbols.

    Args:
        rows: which images they are.
        x: the iterates, and the ones `before`.
        size: of the step.
        value: the loss at `x`.
        best: the point with the largest loss, with its loss and gradient.
        rises: steps since the last checkpoint that raised the loss.
        halved: whether the last checkpoint halved the step; `peak` is the largest loss then.
    """

    rows: Tensor
    x: Tensor
    before: Tensor
    size: Tensor
    value: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    rises: Tensor
    halved: Tensor
    peak: Tensor

    def keep(self, left: Tensor) -> None:
        """Forget the rows that are not left, bool `[n]`."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[left])


def climb(best: BestImages, loss: RowLoss, rows: Tensor, x: Tensor, steps: int) -> None:
    """Run Auto-PGD; see `AdaptivePGD.climb`."""
    none = torch.full_like(x[:, 0, 0, 0], -torch.inf)
    at = Climb(
        rows=rows,
        x=x,
        before=x,
        size=torch.full_like(x[:, :1, :1, :1], 2 * best.eps),
        value=-none,  # the first is no rise
        best=x,
        best_value=none,
        best_gradient=torch.zeros_like(x),
        rises=torch.zeros_like(rows),
        halved=torch.ones_like(rows, dtype=torch.bool),
        peak=none,
    )
    ends, last = checkpoints(steps), 0
    for step in range(steps):
        if not len(at.rows):
            return
        gradient = _evaluate(best, loss, at)
        if step in ends:
            gradient = _halve(at, gradient, step - last)
            last = step
        clean = best.clean[at.rows]
        ahead = at.x + at.size * pgd.normalize(gradient, best.norm)
        moved = pgd.project(ahead, clean, best.eps, best.norm)
        if step:
            mixed = at.x + MOMENTUM * (moved - at.x) + (1 - MOMENTUM) * (at.x - at.before)
            moved = pgd.project(mixed, clean, best.eps, best.norm)
        at.before, at.x = at.x, moved
        left = ~best.done[at.rows]
        if not left.all():
            at.keep(left)
    if len(at.rows):
        with torch.no_grad():
            best.record(at.rows, at.x, best.model(at.x))


def _evaluate(best: BestImages, loss: RowLoss, at: Climb) -> Tensor:
    """Return the gradient at `x`; note the loss there, and the scores."""
    gradient, values = recorded_gradient(best, loss, at.rows, at.x)
    at.rises += values > at.value
    better = values > at.best_value
    at.value = values
    at.best_value = torch.where(better, values, at.best_value)
    at.best = torch.where(_wide(better), at.x, at.best)
    at.best_gradient = torch.where(_wide(better), gradient, at.best_gradient)
    return gradient


def recorded_gradient(
    best: BestImages, loss: RowLoss, rows: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gradient and value of the loss at `x`, and let `best` see the scores there."""
    seen: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        scores = best.model(x)
        values = loss(scores, rows)
        seen.extend((scores.detach(), values.detach()))
        return values

    gradient = pgd.gradient(noted, x)
    scores, values = seen
    best.record(rows, x, scores)
    return gradient, values


def _targeted(labels: Tensor, targets: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    return losses.dlr_targeted(scores, labels[rows], targets[rows])


def checkpoints(steps: int) -> set[int]:
    """Return the steps after which the step size is reconsidered (section 3.1)."""
    percent, width = 22, 22
    found = set()
    while percent < 100:
        found.add(math.ceil(percent * steps / 100))
        width = max(width - 3, 6)
        percent += width
    return found


def _halve(at: Climb, gradient: Tensor, steps: int) -> Tensor:
    """Halve the step where progress has ended (conditions 1 and 2), and return to the best point.

    Returns:
        the gradient at `x`.
    """
    stuck = (at.rises < RISING * steps) | (~at.halved & (at.best_value <= at.peak))
    at.size = torch.where(_wide(stuck), at.size / 2, at.size)
    at.x = torch.where(_wide(stuck), at.best, at.x)
    at.before = torch.where(_wide(stuck), at.best, at.before)
    at.value = torch.where(stuck, at.best_value, at.value)
    at.halved, at.peak, at.rises = stuck, at.best_value, torch.zeros_like(at.rises)
    return torch.where(_wide(stuck), at.best_gradient, gradient)


def _wide(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]
