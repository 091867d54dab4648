"""The best adversarial image found so far for each clean image, as a float and in 8 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.data.splits import to_float
from training.pgd import Norm
from verification.attacks.batches import in_slices
from verification.attacks.losses import margins
from verification.attacks.perturbation import quantize

# Of the scores' range: an image that is wrong by this much is done. An fp16 or int8 file, scored
# in place of the weights that are attacked here, may be off by less.
CLEARLY = 0.05


class BestImages:
    """The best adversarial images of a search that scores its iterates.

    `images` are 8-bit images that are answered wrongly where one was found, else floats answered
    wrongly, else those with the largest margin. `done` marks those clearly wrong in 8 bits: rounded
    inward, they lie in the ball of floats, too. Threads may share it if their rows differ.

    Args:
        model: from images to logits.
        clean: float32 `[N, C, H, W]` in `[0,1]`.
        labels: int64 `[N]`.
        eps: radius of the ball.
        norm: of the ball.
    """

    def __init__(
        self, model: nn.Module, clean: Tensor, labels: Tensor, eps: float, norm: Norm
    ) -> None:
        self.model, self.clean, self.labels = model, clean, labels
        self.eps, self.norm = eps, norm
        self.images = clean.clone()
        self.done = torch.zeros_like(labels, dtype=torch.bool)
        self._pixels = (clean * 255).round().to(torch.uint8)
        self._margin = torch.full_like(clean[:, 0, 0, 0], -torch.inf)
        self._versions = torch.zeros_like(labels)  # answered wrongly: 2 in 8 bits, 1 as a float

    def nearest(self, share: float) -> Tensor:
        """Return the share of the images not done that has the largest margins, in their order."""
        rows = (~self.done).nonzero()[:, 0]
        order = self._margin[rows].argsort(descending=True, stable=True)
        return rows[order[: math.ceil(share * len(rows))].sort().values]

    def likeliest_wrong(self) -> Tensor:
        """Return the wrong classes of the clean images, the likeliest first, `[N, classes - 1]`."""

        @torch.no_grad()
        def order(part: slice) -> Tensor:
            scores: Tensor = self.model(self.clean[part])
            scores = scores.scatter(1, self.labels[part, None], -torch.inf)
            return scores.argsort(1, descending=True)[:, :-1]

        return torch.cat(in_slices(order, len(self.clean), self.clean))

    @torch.no_grad()
    def record(self, rows: Tensor, x: Tensor, scores: Tensor) -> None:
        """Keep the better ones of these iterates, as they are or rounded to 8 bits.

        Rounding is tried where an iterate is answered wrongly or came nearer than all before.

        Args:
            rows: int64 `[n]`: whose iterates they are.
            x: `[n, C, H, W]`.
            scores: of `x`, `[n, classes]`.
        """
        floats, range_ = _margins(scores, self.labels[rows])
        near = (floats > 0) | (floats > self._margin[rows])
        rows, x, floats, range_ = rows[near], x[near], floats[near], range_[near]
        if not len(rows):
            return
        rounded = to_float(quantize(x, self._pixels[rows], self.eps, self.norm))
        eights, _ = _margins(self.model(rounded), self.labels[rows])
        in_8_bits = eights > 0
        margin = torch.where(in_8_bits, eights, floats)
        versions = torch.where(in_8_bits, 2, (floats > 0).long())
        before = self._versions[rows]
        better = (versions > before) | ((versions == before) & (margin > self._margin[rows]))
        found = rows[better]
        self.images[found] = torch.where(in_8_bits[:, None, None, None], rounded, x)[better]
        self._margin[found], self._versions[found] = margin[better], versions[better]
        self.done[rows] = in_8_bits & (eights > CLEARLY * range_)


def _margins(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return best wrong less right score, and the range of the scores; `[n]` each.

    A score that is not finite is no success.
    """
    finite = scores.isfinite().all(1)
    margin = torch.where(finite, margins(scores, labels), -torch.inf)
    return margin, scores.amax(1) - scores.amin(1)
