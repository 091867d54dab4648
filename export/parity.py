"""Parity: the exported file must give the logits that torch gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.session import Engine
from dverge_serve.images import to_float
from training.models.ensemble import Ensemble

RELATIVE = 1e-4
BATCHES = (1, 2, 7)


@dataclass(frozen=True)
class Parity:
    """How far two sets of logits are apart.

    Args:
        images: how many were compared.
        difference: largest absolute difference of any logit, the members' included.
        tolerance: what is allowed: `1e-4 * max(1, largest |logit|)`.
        disagreements: images whose answers differ although the margin exceeds twice the tolerance.
    """

    images: int
    difference: float
    tolerance: float
    disagreements: int

    @property
    def holds(self) -> bool:
        """Whether the two agree; NaN never does."""
        return self.difference <= self.tolerance and self.disagreements == 0

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.2e} (allowed {self.tolerance:.2e}), "
            f"{self.disagreements} of {self.images} answers differ"
        )


def compare(expected: Scores, found: Scores) -> Parity:
    """Compare torch's outputs with the engine's on the same images."""
    pairs = [(expected.logits, found.logits), (expected.member_logits, found.member_logits)]
    difference = float(np.max([np.abs(one - other).max() for one, other in pairs]))  # NaN stays
    largest = max(float(np.abs(one).max()) for one, _ in pairs)
    tolerance = RELATIVE * max(1.0, largest)
    top = np.sort(expected.logits, axis=1)
    clear = top[:, -1] - top[:, -2] > 2 * tolerance
    differ = expected.predictions != found.predictions
    return Parity(len(expected), difference, tolerance, int((differ & clear).sum()))


@torch.no_grad()
def torch_scores(ensemble: Ensemble, images: Tensor, batch: int = 256) -> Scores:
    """Return torch's logits for float32 images `[N,C,H,W]` in `[0,1]`."""
    parts = []
    for part in torch.split(images, batch):
        own = ensemble.member_logits(part)
        parts.append(Scores(own.mean(1).cpu().numpy(), own.cpu().numpy()))
    return Scores.concatenate(parts)


def check(engine: Engine, ensemble: Ensemble, probe: npt.NDArray[np.uint8]) -> Parity:
    """Compare the engine with torch on 8-bit images, at batches of 1, 2 and 7; the worst counts."""
    images = to_float(probe)
    expected = torch_scores(ensemble, torch.from_numpy(images))
    found = [compare(expected, engine.run_all(images, batch)) for batch in BATCHES]
    return max(found, key=lambda parity: (not parity.holds, parity.difference))
