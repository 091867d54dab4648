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
from training.data.splits import to_float
from training.models.ensemble import Ensemble
from training.pgd import Norm
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.attack import Attack, Crafted, Model
from verification.attacks.batches import in_slices
from verification.attacks.gradient_attack import LOSSES, members_of
from verification.attacks.perturbation import quantize

ApgdLoss = Literal["ce", "cw", "dlr", "targeted"]
RowLoss = Callable[[Tensor, Tensor], Tensor]  # scores [n, classes], rows [n] -> loss [n]
MOMENTUM = 0.75  # alpha of the paper's step
RISING = 0.75  # rho: the share of steps that must raise the loss
NEAREST = 0.25  # share of the standing images that the longer climbs go on with
CLEARLY = 0.01  # of the scores' range: an image that is wrong by this much is done


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
        search = Search(ensemble, images, labels, eps, self.norm)
        climbs = [
            (1.0, self.steps),
            *([(NEAREST, self.nearest_steps)] if self.nearest_steps else []),
        ]
        goals = self._losses(search)
        for number, ((share, steps), loss) in enumerate(product(climbs, goals)):
            search.climb_all(loss, search.nearest(share), steps, (*seed, number))
        return Crafted(search.images)

    @property
    def work(self) -> int:
        """Passes through the source, for progress."""
        return round(self.steps + NEAREST * self.nearest_steps) * self.targets

    def _losses(self, search: Search) -> list[RowLoss]:
        """Return the losses to climb, one for each target."""
        labels = search.labels
        if self.loss != "targeted":
            loss = LOSSES[self.loss]
            return [lambda scores, rows: loss(lambda same: same, labels[rows])(scores)]
        likeliest = search.likeliest_wrong()[:, : self.targets]
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


class Search:
    """The best adversarial image of each image, over several climbs.

    `images` are 8-bit images that are answered wrongly where one was found, else floats answered
    wrongly, else those with the largest margin.

    Args:
        model: from images to logits.
        clean: float32 `[N, C, H, W]` in `[0,1]`.
        labels: int64 `[N]`.
        eps: radius of the ball.
        norm: of the ball.
    """

    def __init__(
        self, model: Ensemble, clean: Tensor, labels: Tensor, eps: float, norm: Norm
    ) -> None:
        self.model, self.clean, self.labels = model, clean, labels
        self._eps, self._norm = eps, norm
        self._pixels = (clean * 255).round().to(torch.uint8)
        self.images = clean.clone()
        self.margin = torch.full_like(clean[:, 0, 0, 0], -torch.inf)
        self.versions = torch.zeros_like(labels)  # answered wrongly: 2 in 8 bits, 1 as a float
        self.done = torch.zeros_like(labels, dtype=torch.bool)

    def nearest(self, share: float) -> Tensor:
        """Return the share of the images not done that has the largest margins, in their order."""
        rows = (~self.done).nonzero()[:, 0]
        order = self.margin[rows].argsort(descending=True, stable=True)
        return rows[order[: math.ceil(share * len(rows))].sort().values]

    def likeliest_wrong(self) -> Tensor:
        """Return the wrong classes of the clean images, the likeliest first, `[N, classes - 1]`."""

        @torch.no_grad()
        def order(part: slice) -> Tensor:
            scores: Tensor = self.model(self.clean[part])
            scores = scores.scatter(1, self.labels[part, None], -torch.inf)
            return scores.argsort(1, descending=True)[:, :-1]

        return torch.cat(in_slices(order, len(self.clean), self.clean.device))

    def climb_all(
        self, loss: RowLoss, rows: Tensor, steps: int, seed_path: tuple[int | str, ...]
    ) -> None:
        """Climb with some images from random starts, a batch at a time; see `climb`."""

        def batch(part: slice) -> None:
            draw = generator(*seed_path, part.start, device=rows.device)
            start = pgd.random_start(self.clean[rows[part]], self._eps, draw, self._norm)
            self.climb(loss, rows[part], start, steps)

        in_slices(batch, len(rows), rows.device)

    def climb(self, loss: RowLoss, rows: Tensor, x: Tensor, steps: int) -> None:
        """Run Auto-PGD on some images; those that are done drop out.

        Args:
            loss: to raise; it is given the scores of some rows, and which they are.
            rows: int64 `[n]`: the images; several threads may climb with different ones.
            x: where each begins, `[n, C, H, W]` in the ball.
            steps: gradient steps.
        """
        none = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        at = Climb(
            rows=rows,
            x=x,
            before=x,
            size=torch.full_like(x[:, :1, :1, :1], 2 * self._eps),
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
            gradient = self._evaluate(loss, at)
            if step in ends:
                gradient = _halve(at, gradient, step - last)
                last = step
            self._step(at, gradient, first=step == 0)
            left = ~self.done[at.rows]
            if not left.all():
                at.keep(left)
        if len(at.rows):
            with torch.no_grad():
                self._record(at.rows, at.x, self.model(at.x))

    def _evaluate(self, loss: RowLoss, at: Climb) -> Tensor:
        """Return the gradient at `x`; note the loss there, and the scores."""
        seen: list[Tensor] = []

        def noted(x: Tensor) -> Tensor:
            scores = self.model(x)
            values = loss(scores, at.rows)
            seen.extend((scores.detach(), values.detach()))
            return values

        gradient = pgd.gradient(noted, at.x)
        scores, values = seen
        self._record(at.rows, at.x, scores)
        at.rises += values > at.value
        better = values > at.best_value
        at.value = values
        at.best_value = torch.where(better, values, at.best_value)
        at.best = torch.where(_wide(better), at.x, at.best)
        at.best_gradient = torch.where(_wide(better), gradient, at.best_gradient)
        return gradient

    def _step(self, at: Climb, gradient: Tensor, *, first: bool) -> None:
        """Move `x` by the paper's step with momentum."""
        clean = self.clean[at.rows]
        ahead = at.x + at.size * pgd.normalize(gradient, self._norm)
        moved = pgd.project(ahead, clean, self._eps, self._norm)
        if not first:
            mixed = at.x + MOMENTUM * (moved - at.x) + (1 - MOMENTUM) * (at.x - at.before)
            moved = pgd.project(mixed, clean, self._eps, self._norm)
        at.before, at.x = at.x, moved

    @torch.no_grad()
    def _record(self, rows: Tensor, x: Tensor, scores: Tensor) -> None:
        """Keep the better ones of these iterates, as they are or rounded to 8 bits.

        Rounding is tried where an iterate is answered wrongly or came nearer than all before.
        """
        floats, range_ = _margins(scores, self.labels[rows])
        near = (floats > 0) | (floats > self.margin[rows])
        rows, x, floats, range_ = rows[near], x[near], floats[near], range_[near]
        if not len(rows):
            return
        rounded = to_float(quantize(x, self._pixels[rows], self._eps, self._norm))
        eights, _ = _margins(self.model(rounded), self.labels[rows])
        in_8_bits = eights > 0
        margin = torch.where(in_8_bits, eights, floats)
        versions = torch.where(in_8_bits, 2, (floats > 0).long())
        before = self.versions[rows]
        better = (versions > before) | ((versions == before) & (margin > self.margin[rows]))
        found = rows[better]
        self.images[found] = torch.where(_wide(in_8_bits), rounded, x)[better]
        self.margin[found], self.versions[found] = margin[better], versions[better]
        self.done[rows] = in_8_bits & (eights > CLEARLY * range_)


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


def _margins(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return best wrong less right score, and the range of the scores; `[n]` each.

    A score that is not finite is no success.
    """
    finite = scores.isfinite().all(1)
    margin = torch.where(finite, losses.margins(scores, labels), -torch.inf)
    return margin, scores.amax(1) - scores.amin(1)


def _wide(rows: Tensor) -> Tensor:
    return rows[:, None, None, None]
