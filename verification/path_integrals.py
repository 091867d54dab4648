"""Gradients against differences: along a path, gradients add up to the change of the loss.

The fundamental theorem of calculus, as a test of a gradient: integrated from one image to another
it must give the difference of their losses, which the deployed file tells. Small steps would tell
less: a quantiser is constant inside its cells, and there any small gradient beside it is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training import pgd
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.seeds import generator
from verification.attacks import losses
from verification.attacks.batches import in_slices, spread
from verification.attacks.outcomes import Pixels
from verification.attacks.target import Scorer

POINTS = 16  # gradients on one path, at the middle of as many equal parts
CORNERS = 3  # paths to random corners of the ball
MOST_IMAGES = 64
ROUNDING = 1e-4  # of the largest logit: what rounding may add to a difference


def unexplained(
    members: Sequence[nn.Module],
    engine: Scorer,
    split: Split,
    worst: Pixels | None,
    eps: float,
    norm: pgd.Norm,
    seed: int,
    most: int = 0,
) -> npt.NDArray[np.float64]:
    """Return what share of the loss's changes the gradients do not explain, for each image.

    Paths lead from the clean image to random corners of the ball and to an adversarial image. With
    `m` the change of the CW margin at the end of a path, by the engine, and `p` the integral of
    the members' gradient along it, the share is `sum (m - p)^2 / sum m^2` over the paths. It is 0
    for the model's own gradient, and about 1 for one that has nothing to do with it.

    Args:
        members: that give the gradients.
        engine: scores the file.
        split: clean images.
        worst: adversarial images of the same radius, uint8 `[n, C, H, W]`, if there are any.
        eps: the radius.
        norm: of the ball.
        seed: of the random corners.
        most: images that are used, evenly spaced; 0, and never more: `MOST_IMAGES`.

    Returns:
        float64, one value for each image used.
    """
    rows = spread(split, MOST_IMAGES, most)
    part = split.take(rows)
    clean = to_float(part.images)
    draw = generator(seed, "paths", device=split.device)
    ends = []
    for _ in range(CORNERS):
        noise = torch.randn(clean.shape, generator=draw, device=split.device)
        ends.append(pgd.project(clean + eps * pgd.normalize(noise, norm), clean, eps, norm))
    if worst is not None:
        ends.append(to_float(torch.from_numpy(worst[rows.cpu().numpy()]).to(split.device)))
    labels = part.labels
    start, largest = _margins(engine, clean, labels)
    found = np.stack([_margins(engine, end, labels)[0] - start for end in ends])
    told = np.stack([_integrals(members, clean, end, labels) for end in ends])
    wrong, whole = np.square(found - told).sum(0), np.square(found).sum(0)
    floor = len(ends) * (ROUNDING * largest) ** 2
    return np.asarray(np.where(wrong <= floor, 0.0, wrong / np.maximum(whole, floor)))


def _margins(
    engine: Scorer, images: Tensor, labels: Tensor
) -> tuple[npt.NDArray[np.float64], float]:
    """Return the CW margin of each image by the engine, and the size of the largest logit."""
    logits = torch.from_numpy(engine.run_all(images.cpu().numpy()).logits).double()
    return losses.margins(logits, labels.cpu()).numpy(), max(1.0, float(logits.abs().max()))


def _integrals(
    members: Sequence[nn.Module], start: Tensor, end: Tensor, labels: Tensor
) -> npt.NDArray[np.float64]:
    """Return the integral of the margin's gradient from start to end, by the midpoint rule."""
    ensemble = Ensemble(members).eval()

    def batch(part: slice) -> Tensor:
        change = end[part] - start[part]
        loss = losses.cw_margin(ensemble, labels[part])
        total = torch.zeros(len(change), dtype=torch.float64, device=change.device)
        for point in range(POINTS):
            slope = pgd.gradient(loss, start[part] + (point + 0.5) / POINTS * change)
            total += (slope * change).sum((1, 2, 3)).double() / POINTS
        return total

    return torch.cat(in_slices(batch, len(start), start)).cpu().numpy()
