"""Statistics over cells: shares with intervals, and paired differences between two variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from benchmarks.evidence.record import Record, unpacked
from verification.attacks.outcomes import Mask

RESAMPLES = 10_000
SEED = 20200930
MARGIN = -0.02  # what a fast recipe may lose and still count as not inferior

Stack = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Share:
    """A share of images, the mean over training seeds.

    Args:
        value: 0..1.
        low, high: Wilson's 95% interval at the number of distinct images: those of other seeds are
            the same images again, and make the interval no narrower.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of two variants' shares, with its bootstrap 95% interval."""

    value: float
    low: float
    high: float

    @property
    def not_inferior(self) -> bool:
        """Whether the first is not worse than the second by the margin or more."""
        return self.low > MARGIN


def stack(records: Sequence[Record], what: str, eps: float | None = None, rule: str = "") -> Stack:
    """Return which images each seed's model gets right, bool `[seeds, images]`.

    Args:
        records: of one variant, one a seed.
        what: `clean`, `transfer` or `white_box`.
        eps: the radius; None for clean.
        rule: of combination; by default what the model file itself answers.
    """
    rows: list[Mask] = []
    for each in records:
        table: dict[str, Any] = each["rules"][rule] if rule else each["outcomes"]
        bits = table[what] if eps is None else table[what][f"{eps:g}"]
        rows.append(unpacked(bits, each["n"]))
    return np.stack(rows)


def share(right: Stack) -> Share:
    """Return the mean share of `[seeds, images]` with its interval."""
    value, n = float(right.mean()), right.shape[1]
    interval = binomtest(round(value * n), n).proportion_ci(0.95, method="wilson")
    return Share(value, min(float(interval.low), value), max(float(interval.high), value))


def difference(ours: Stack, theirs: Stack, resamples: int = RESAMPLES) -> Difference:
    """Return the difference of two variants over the same images and seeds.

    Images and seeds are both drawn again with replacement, the same draw on both sides.

    Args:
        ours, theirs: bool `[seeds, images]`, rows of the same seeds, columns of the same images.
        resamples: draws; always the same ones.
    """
    apart = ours.astype(np.float64) - theirs
    counts, chosen = _draws(*apart.shape, resamples)
    by_seed = counts @ apart.T / apart.shape[1]  # [resamples, seeds]
    found = np.take_along_axis(by_seed, chosen, axis=1).mean(axis=1)
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(float(apart.mean()), float(low), float(high))


@cache
def _draws(
    seeds: int, images: int, resamples: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return how often each image, and which seeds, are in each resample."""
    draw = np.random.default_rng(SEED)
    counts = draw.multinomial(images, np.full(images, 1 / images), resamples)
    return counts.astype(np.float64), draw.integers(0, seeds, (resamples, seeds))
