"""Fixed patterns, the same for every image: weaknesses that no gradient and no score leads to.

A model may answer wrongly wherever a fixed direction is strong enough, and show no sign of it
before: no gradient, no change of a score, so that neither climbs nor searches by queries ever come
near. A half-space along a checkerboard is one. Such a weakness needs no search: one image of +-eps,
added to any photograph, is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.linalg import hadamard
from torch import Tensor

from training.seeds import derive
from verification.attacks.attack import Attack, Crafted, Model, Threat
from verification.attacks.perturbation import uint8_steps
from verification.config import LARGE

ORDER = 8  # of the Walsh-Hadamard matrix: patterns of 8 x 8 signs
PERIODS = (2, 3, 4, 5, 6, 8)  # of stripes, pixels
TRIED_ON, AT_LEAST = 32, 8  # images that every pattern is tried on, fewer of large images
KEPT = 4  # patterns that are added to all images


@dataclass(frozen=True, kw_only=True)
class UniversalPatterns(Attack, kind="patterns"):
    """Signs times eps, added to every image: constants, stripes, checkerboards and products.

    The patterns are those of `patterns`. Every one is tried on a random sample of the images, and
    those that break most of it, each on what the ones before left, are added to all images.

    It counts as `transfer`, like noise: no pattern depends on the model. The model's answers only
    decide which of them are worth scoring; a caller who sent all of them unseen would break no
    fewer images.
    """

    one_search: ClassVar[bool] = True

    threat: Threat = "transfer"
    source: str = "target"

    @property
    def asks(self) -> bool:
        """Whether it is given the target's answers."""
        return True

    @property
    def work(self) -> int:
        """Passes through the source, for progress: all patterns on a sample of 200 images."""
        return 64

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one version of every image; see `Attack.run`."""
        return self.run_radii(model, images, labels, [eps], *seed)[0]

    def run_radii(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        radii: Sequence[float],
        *seed: int | str,
    ) -> list[Crafted]:
        """Craft at every radius; see `Attack.run_radii`.

        A pattern that breaks none of the sample at one radius is not tried at smaller ones.
        """
        tried_on = TRIED_ON * LARGE // max(images.shape[2] * images.shape[3], LARGE)
        order = np.random.default_rng(derive(*seed)).permutation(len(images))
        order = order[: max(tried_on, AT_LEAST)]
        sample = torch.from_numpy(np.sort(order)).to(images.device)
        every, made = patterns(*images.shape[1:]), dict[float, Crafted]()
        for eps in sorted(radii, reverse=True):
            made[eps], bites = self._craft(model, images, labels, eps, every, sample)
            every = every[bites] if bites.any() else every[:KEPT]
        return [made[eps] for eps in radii]

    @torch.no_grad()
    def _craft(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        eps: float,
        every: Tensor,
        sample: Tensor,
    ) -> tuple[Crafted, Tensor]:
        """Craft one version of every image: the first pattern that breaks it, else the best one.

        The perturbation is a whole number of 8-bit steps in Linf; in L2 its length is eps.

        Returns:
            the images, and which of the patterns broke any of the sample.
        """
        size = uint8_steps(eps) / 255 if self.norm == "linf" else eps / every[0].numel() ** 0.5

        def added(pattern: Tensor, x: Tensor) -> Tensor:
            return (x + size * pattern.to(x)).clamp(0, 1)

        def wrong(x: Tensor, y: Tensor) -> Tensor:
            return model(x).argmax(1).to(y.device) != y

        x, y = images[sample], labels[sample]
        broken = torch.stack([wrong(added(pattern, x), y) for pattern in every])
        chosen = [every[index] for index in most_breaking(broken, KEPT)]
        found = added(chosen[0], images)
        standing = torch.arange(len(images), device=images.device)
        for pattern in chosen:
            if not len(standing):  # a model with noise may break the last ones early
                break
            tried = added(pattern, images[standing])
            fallen = wrong(tried, labels[standing])
            found[standing[fallen]] = tried[fallen]
            standing = standing[~fallen]
        told = broken & ~broken.all(0)  # not the images that are wrong whatever is added
        return Crafted(found), told.any(1).cpu()


def patterns(channels: int, height: int, width: int) -> Tensor:
    """Return the family of patterns, int8 `[patterns, C, H, W]` of -1 and 1.

    The 64 outer products of the Walsh-Hadamard functions of order 8, repeated every 8 pixels (high
    frequencies, checkerboards) and stretched over the image (low ones), and stripes along rows,
    columns and both diagonals, in all phases of small periods; all equal in all channels. And one
    constant for each combination of signs of the channels. All with both signs, none twice: 232 on
    grey images of 8 x 8 pixels, 364 on large colour ones.
    """
    waves = torch.from_numpy(hadamard(ORDER, dtype=np.int8))
    squares = torch.einsum("ia,jb->ijab", waves, waves).flatten(0, 1)
    rows, columns = torch.arange(height), torch.arange(width)
    tiled = squares[:, rows % ORDER][:, :, columns % ORDER]
    stretched = squares[:, rows * ORDER // height][:, :, columns * ORDER // width]
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    stripes = [
        ((line + shift) % period * 2 < period) * 2 - 1
        for line in (down, across, down + across, down - across)
        for period in PERIODS
        for shift in range(0, period, max(1, period // 4))
    ]
    planes = torch.cat([tiled, stretched, torch.stack(stripes).to(torch.int8)])
    planes = planes[:, None].expand(-1, channels, -1, -1)
    casts = torch.tensor([*itertools.product((1, -1), repeat=channels)], dtype=torch.int8)
    constants = casts[:, :, None, None].expand(-1, -1, height, width)
    return torch.from_numpy(np.unique(torch.cat([planes, -planes, constants]).numpy(), axis=0))


def most_breaking(broken: Tensor, count: int) -> list[int]:
    """Return up to `count` patterns, each breaking most of what the ones before left.

    Args:
        broken: bool `[patterns, images]`.
        count: at most; at least one is returned, and later ones only if they break more.
    """
    standing = torch.ones_like(broken[0])
    chosen: list[int] = []
    while len(chosen) < count:
        more = (broken & standing).sum(1)
        best = int(more.argmax())
        if chosen and not more[best]:
            break
        chosen.append(best)
        standing &= ~broken[best]
    return chosen
