"""RayS (Chen and Gu, KDD 2020, arXiv 2006.12792): the shortest ray to a wrong label, Linf."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verification.attacks.label_search import Floats, LabelAttack, Search

TOLERANCE = 1e-3  # of the binary search; an 8-bit step is 4e-3


@dataclass(frozen=True, kw_only=True)
class RayS(LabelAttack, kind="rays"):
    """RayS: search the corner of the Linf ball in whose direction a wrong label is nearest.

    Nothing in it is random.
    """

    def search(self, clean: Floats, draw: np.random.Generator) -> Search:
        """Flip the signs of ever smaller blocks of the direction (algorithm 3).

        A direction that is not wrong at the shortest radius so far costs one query; any other is
        searched by halving (algorithm 2). Radii are Linf, of the direction before the image is cut
        to `[0,1]`.
        """
        direction, shortest, level = np.ones(clean.size, np.float32), 1.0, 0

        def along(signs: Floats, radius: float) -> Floats:
            return np.clip(clean + np.float32(radius) * signs.reshape(clean.shape), 0, 1)[None]

        while True:
            length = -(-clean.size // 2**level)
            for start in range(0, clean.size, length):
                tried = direction.copy()
                tried[start : start + length] *= -1
                if not (yield along(tried, shortest))[0]:
                    continue
                low, high = 0.0, shortest
                while high - low > TOLERANCE:
                    middle = (low + high) / 2
                    if (yield along(tried, middle))[0]:
                        high = middle
                    else:
                        low = middle
                if high < shortest:
                    direction, shortest = tried, high
            level += 1
