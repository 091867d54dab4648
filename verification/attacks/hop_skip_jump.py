"""HopSkipJump (Chen, Jordan and Wainwright, 2020, arXiv 1904.02144): Linf and L2."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verification.attacks.label_search import Floats, LabelAttack, Search, as_asked

TOGETHER = 50  # candidates asked at once, which bounds the memory
STARTS = 100  # random images tried as a first wrong one
FIRST_PROBES, MOST_PROBES = 100, 10_000
TOLERANCE = 2**-10  # of the binary search, relative: changes are float16, which tells no more

Answer = Generator[Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(LabelAttack, kind="hop-skip-jump"):
    """HopSkipJump: walk along the decision boundary by gradients estimated from labels."""

    def search(self, clean: Floats, draw: np.random.Generator) -> Search:
        """Estimate the boundary's direction, step, and return to the boundary (algorithm 2).

        The settings are the paper's: 100 sqrt(t) probes in iteration t, as long as the tolerance of
        the binary search asks for (section IV-C). The tolerance itself is not: the paper's, d^-3/2
        (L2) or d^-2 (Linf) for images of d pixels, is finer than float16 changes are, which would
        drown the probes.
        """
        probe = TOLERANCE * (clean.size if self.norm == "linf" else clean.size**0.5)
        for _ in range(STARTS):
            found = draw.random(clean.shape, dtype=np.float32)
            if (yield found[None])[0]:
                break
        else:
            return
        found = yield from self._boundary(clean, found)
        iteration = 1
        while True:
            distance = self._distance(clean, found)
            probes = min(int(FIRST_PROBES * math.sqrt(iteration)), MOST_PROBES)
            direction = yield from self._direction(clean, found, probe * distance, probes, draw)
            step = distance / math.sqrt(iteration)
            while True:
                moved = np.clip(found + np.float32(step) * direction, 0, 1)
                if (yield moved[None])[0]:
                    break
                step /= 2
                if step < 1e-6:  # nothing along this direction is wrong
                    moved = found
                    break
            found = yield from self._boundary(clean, moved)
            iteration += 1

    def _distance(self, clean: Floats, found: Floats) -> float:
        change = np.abs(found - clean)
        return float(change.max() if self.norm == "linf" else np.sqrt((change**2).sum()))

    def _boundary(
        self, clean: Floats, wrong: Floats
    ) -> Generator[Floats, npt.NDArray[np.bool_], Floats]:
        """Return the wrong image where the way from `clean` to `wrong` meets the boundary.

        The way is the straight one (L2), or the projections on smaller Linf balls (algorithm 1).
        """
        low, high = 0.0, self._distance(clean, wrong) if self.norm == "linf" else 1.0
        best = wrong
        while high - low > TOLERANCE * high:
            middle = np.float32((low + high) / 2)
            if not low < middle < high:  # float32 holds nothing between them
                break
            if self.norm == "linf":
                tried = np.clip(wrong, clean - middle, clean + middle)
            else:
                tried = (1 - middle) * clean + middle * wrong
            if (yield tried[None])[0]:
                high, best = float(middle), tried
            else:
                low = float(middle)
        return best

    def _direction(
        self, clean: Floats, found: Floats, reach: float, probes: int, draw: np.random.Generator
    ) -> Generator[Floats, npt.NDArray[np.bool_], Floats]:
        """Return the direction of the boundary's normal, estimated from probes around `found`.

        That is equation 16: the answers less their mean weigh the probes, as they were asked.
        """
        shape = (probes, *found.shape)
        if self.norm == "linf":
            noise = draw.uniform(-1, 1, shape).astype(np.float32)
        else:
            noise = draw.standard_normal(shape, dtype=np.float32)
        noise /= np.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
        found = as_asked(clean, found)
        tried = as_asked(clean, np.clip(found + np.float32(reach) * noise, 0, 1))
        noise = (tried - found) / np.float32(reach)
        answers = []
        for start in range(0, probes, TOGETHER):
            answers.append((yield tried[start : start + TOGETHER]))
        signs = np.where(np.concatenate(answers), 1.0, -1.0).astype(np.float32)
        weights = signs if abs(signs.mean()) == 1 else signs - signs.mean()
        mean = (weights[:, None, None, None] * noise).mean(0)
        if self.norm == "linf":
            return np.asarray(np.sign(mean))
        return np.asarray(mean / max(float(np.sqrt((mean**2).sum())), 1e-12))
