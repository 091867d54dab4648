"""Square (Andriushchenko et al., 2020), which sees scores alone: batched, every query counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.seeds import derive
from verification.attacks import losses
from verification.attacks.attack import Crafted, Model
from verification.attacks.query_attack import QueryAttack

Floats = npt.NDArray[np.float32]
Score = Callable[[Floats], npt.NDArray[np.floating]]  # images [n, C, H, W] -> logits [n, classes]
SHARES = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: where it halves


@dataclass(frozen=True, kw_only=True)
class Square(QueryAttack, kind="square"):
    """Square as an attack on the target's scores; Linf.

    Its squares shrink on a schedule over `queries`: with a larger budget it begins differently.
    """

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image; see `Attack.run`."""

        @torch.no_grad()
        def score(pixels: Floats) -> Floats:
            return model(torch.from_numpy(pixels).to(images.device)).cpu().numpy()

        clean, wanted = images.cpu().numpy(), labels.cpu().numpy()
        found = square(score, clean, wanted, eps=eps, queries=self.queries, seed=derive(*seed))
        return Crafted(torch.from_numpy(found.images).to(images.device), found.queries)


class SquareResult(NamedTuple):
    """The outcome of one search.

    Args:
        images: float32 `[N, C, H, W]`: the best candidate of each image, broken or not.
        queries: int `[N]`: queries spent on each image.
        broken: bool `[N]`: which are answered wrongly.
    """

    images: Floats
    queries: npt.NDArray[np.int64]
    broken: npt.NDArray[np.bool_]


def square(
    score: Score,
    clean: Floats,
    labels: npt.NDArray[np.int64],
    *,
    eps: float,
    queries: int,
    seed: int,
    share: float = 0.8,
) -> SquareResult:
    """Search for adversarial images by random squares of +-eps (algorithm 1 and 2, Linf).

    Each image is tried until its answer is wrong or `queries` are spent. Every image has random
    numbers of its own: its result does not depend on its neighbours.

    Args:
        score: called with the images not yet broken; each call counts for each of them.
        clean: `[N, C, H, W]` in `[0,1]`.
        labels: `[N]`.
        eps: Linf radius.
        queries: most for an image, the first (vertical stripes) included.
        seed: of the squares.
        share: of the image that the first squares cover.
    """
    draws = [np.random.default_rng([seed, index]) for index in range(len(clean))]
    _, channels, height, width = clean.shape
    spent = np.zeros(len(clean), dtype=np.int64)
    best = clean.copy()
    for index, draw in enumerate(draws):
        stripes = eps * _signs(draw, (channels, 1, width))
        best[index] = np.clip(clean[index] + stripes, 0, 1)
    left = np.arange(len(clean))
    if not queries or not len(clean):
        return SquareResult(best, spent, np.zeros(len(clean), dtype=bool))
    margin = _margins(score(best), labels)
    spent += 1
    left = left[margin[left] > 0]
    for step in range(1, queries):
        if not len(left):
            break
        side = _side(share, step, queries, height, width)
        tried = best[left]
        for row, at in enumerate(left):
            _paint(tried[row], clean[at], draws[at], side, eps)
        found = _margins(score(tried), labels[left])
        spent[left] += 1
        better = found < margin[left]
        best[left[better]] = tried[better]
        margin[left[better]] = found[better]
        left = left[margin[left] > 0]
    return SquareResult(best, spent, margin <= 0)


def _paint(image: Floats, clean: Floats, draw: np.random.Generator, side: int, eps: float) -> None:
    """Set one random square of `image` to the clean one +-eps, a sign for each channel."""
    channels, height, width = image.shape
    top = int(draw.integers(height - side + 1))
    left = int(draw.integers(width - side + 1))
    where = np.s_[:, top : top + side, left : left + side]
    image[where] = np.clip(clean[where] + eps * _signs(draw, (channels, 1, 1)), 0, 1)


def _signs(draw: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return np.where(draw.random(shape) < 0.5, np.float32(-1), np.float32(1))


def _side(share: float, step: int, queries: int, height: int, width: int) -> int:
    """Return the squares' side: the share of the image halves on the paper's schedule."""
    position = step / queries * 10_000
    halvings = sum(position > each for each in SHARES)
    side = round(math.sqrt(share / 2.0**halvings * height * width))
    return max(1, min(side, height - 1, width - 1))


def _margins(
    logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return right less best wrong score; an output that is not finite is no success."""
    scores = torch.from_numpy(logits.astype(np.float64))
    margin = -losses.margins(scores, torch.from_numpy(labels)).numpy()
    wrong = ~np.isfinite(logits).all(axis=1)
    margin[wrong] = np.inf
    return np.asarray(np.where(margin == 0, _tie(logits, labels), margin))


def _tie(
    logits: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Equal scores: the first class answers; 1e-12 where that is still the right one."""
    return np.where(logits.argmax(axis=1) == labels, 1e-12, 0.0)
