"""A self-test of the attacks on a model whose broken images are known exactly.

The model answers by the mean pixel alone: class 1 above a threshold. An image can be broken if and
only if the corner of its ball lies beyond the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dverge_serve.engine.outputs import Scores
from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Mask
from verification.attacks.suite import run_suite
from verification.attacks.target import Target

CHECKING = "checking the attacks"
NEAR = 1e-3  # of eps: images this close to the threshold are left out


class MeanPixel(nn.Module):
    """Two classes by the mean pixel: a linear model, so its gradients are known."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[batch, 2]`."""
        score = 10 * (images.mean((1, 2, 3)) - self.threshold)
        return torch.stack([-score, score], 1)


class TorchScorer:
    """Scores with torch modules where there is no model file."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self._ensemble = Ensemble(members)

    @torch.no_grad()
    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]`."""
        x = torch.from_numpy(np.ascontiguousarray(images))
        logits = self._ensemble.member_logits(x).numpy()
        return Scores(logits.mean(1), logits)


def self_test(split: Split, seed: int) -> tuple[Mask, Mask]:
    """Attack the known model on the images of an evaluation.

    Args:
        split: test images; their labels are ignored.
        seed: of the random start.

    Returns:
        which images can be broken, and which the attack broke, bool `[n]`.
    """
    images = split.images.cpu()
    x = to_float(images)
    means = x.mean((1, 2, 3))
    threshold = float(means.median())
    eps = float((means - threshold).abs().median())  # about half of them can be broken
    step = torch.where(means > threshold, -eps, eps)[:, None, None, None]
    reach = (x + step).clamp(0, 1).mean((1, 2, 3))
    clear = ((reach - threshold).abs() > NEAR * eps) & ((means - threshold).abs() > NEAR * eps)
    chosen = Split(images[clear], (means > threshold).long()[clear])
    expected = ((reach > threshold) != (means > threshold))[clear].numpy()
    model = MeanPixel(threshold)
    attack = GradientAttack(
        name="planted", threat="white_box", source="target", loss="cw", steps=10, rel_stepsize=0.25
    )
    target = Target(TorchScorer([model]), [model])
    outcome = run_suite([attack], {}, {"model": target}, chosen, [eps], seed=seed, label=CHECKING)[
        "model"
    ]
    return np.asarray(expected), ~outcome.robust([attack], eps, ["float"])
