"""RayS and HopSkipJump beside a literal transcription of the paper, and beside ART's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from art.attacks.evasion import HopSkipJump as ByArt
from art.estimators.classification import BlackBoxClassifier
from torch import Tensor

from training.models.ensemble import Ensemble
from training.pgd import Norm
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.label_search import as_asked
from verification.attacks.rays import TOLERANCE, RayS
from verification.metrics.statistics import rate

Image = npt.NDArray[np.float32]


class PaperRayS:
    """RayS on one image as Chen and Gu (2020) write it: L2 radii of unit directions.

    `wrong_at` holds the Linf size of each wrong candidate, by the number of its query.
    """

    def __init__(self, model: Ensemble, image: Image, label: int, queries: int) -> None:
        self.model, self.image, self.label, self.left = model, image, label, queries
        self.asked = 0
        self.wrong_at: dict[int, float] = {}
        size = image.size
        self.longest, self.tolerance = math.sqrt(size), TOLERANCE * math.sqrt(size)
        best, best_radius, level, block = np.ones(size), math.inf, 0, 0
        while self.asked < queries:  # algorithm 3
            blocks = np.arange(size) // math.ceil(size / 2**level)
            tried = np.where(blocks == block, -best, best)
            radius = self.search(tried, best_radius)
            if radius < best_radius:
                best, best_radius = tried, radius
            block += 1
            if block > blocks.max():
                level, block = level + 1, 0

    def search(self, direction: Any, best: float) -> float:
        """Algorithm 2: the distance to the boundary along a direction, or `best`."""
        unit = direction / np.linalg.norm(direction)
        if not self.wrong(unit, min(best, self.longest)):
            return best
        low, high = 0.0, min(best, self.longest)
        while high - low > self.tolerance:
            middle = (low + high) / 2
            if self.wrong(unit, middle):
                high = middle
            else:
                low = middle
        return high

    def wrong(self, unit: Any, radius: float) -> bool:
        if self.asked == self.left:
            return False
        self.asked += 1
        ideal = np.clip(self.image + radius * unit.reshape(self.image.shape), 0, 1)
        # Rounded to the changes that are stored, as the product asks.
        (x,) = as_asked(self.image[None], ideal[None].astype(np.float32))
        with torch.no_grad():
            answer = int(self.model(torch.from_numpy(x[None])).argmax())
        if answer != self.label:
            self.wrong_at[self.asked] = float(np.abs(x - self.image).max())
        return answer != self.label

    def queries_within(self, eps: float) -> int:
        found = [number for number, size in self.wrong_at.items() if size <= eps + 1e-7]
        return min(found, default=self.left)


def test_rays_asks_what_the_paper_asks(ensemble: Ensemble, batch: tuple[Tensor, Tensor]) -> None:
    x, labels = (part[:6] for part in batch)
    radii, queries = [0.05, 0.1, 0.2, 0.3], 200
    attack = RayS(name="rays", queries=queries)
    made = attack.run_radii(attack.seen(ensemble), x, labels, radii, 0)
    ours = np.array([each.queries for each in made])
    paper = [
        PaperRayS(ensemble, image, label, queries)
        for image, label in zip(x.numpy(), labels.tolist(), strict=True)
    ]
    theirs = np.array([[each.queries_within(eps) for each in paper] for eps in radii])
    assert ((ours < queries).sum(1) > 0).any()
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jump_breaks_no_fewer_than_arts(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], norm: Norm
) -> None:
    x, labels = (part[:20] for part in batch)
    asked = 0

    def answers(images: Any) -> Any:
        nonlocal asked
        asked += len(images)
        with torch.no_grad():
            found = ensemble(torch.from_numpy(np.asarray(images, np.float32))).argmax(1)
        return np.eye(10, dtype=np.float32)[found.numpy()]

    seen = BlackBoxClassifier(answers, (1, 8, 8), 10, clip_values=(0.0, 1.0))
    theirs = ByArt(
        seen,
        norm=np.inf if norm == "linf" else 2,
        max_iter=3,
        init_eval=100,
        init_size=100,
        batch_size=64,
        verbose=False,
    )
    state = np.random.get_state()  # noqa: NPY002 - ART draws from the global generator
    np.random.seed(0)  # noqa: NPY002
    found = theirs.generate(x.numpy(), np.eye(10)[labels.numpy()])
    np.random.set_state(state)  # noqa: NPY002
    change = (found - x.numpy()).reshape(len(x), -1)
    sizes = np.abs(change).max(1) if norm == "linf" else np.linalg.norm(change, axis=1)
    eps, queries = float(np.median(sizes)), asked // len(x)
    attack = HopSkipJump(name="hops", queries=queries, norm=norm)
    made = attack.run(attack.seen(ensemble), x, labels, eps, 0).images
    with torch.no_grad():
        broken = (ensemble(made).argmax(1) != labels).numpy()
    ours, art = rate(broken), rate(sizes <= eps)
    # Ours looks at every answer, ART's only at the end of an iteration: it may be better.
    assert ours["value"] >= art["low"]
