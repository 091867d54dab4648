"""Our Auto-PGD beside the reference's: as many images fall, and no others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor

from training.models.ensemble import Ensemble
from verification.attacks.apgd import AdaptivePGD
from verification.attacks.outcomes import Mask
from verification.metrics.statistics import mcnemar

STEPS = 30
OURS = AdaptivePGD(name="apgd", threat="white_box", source="target", steps=STEPS)
TARGETED = AdaptivePGD(
    name="apgd-t", threat="white_box", source="target", steps=STEPS, loss="targeted", targets=9
)
Reference = Callable[[Ensemble, Tensor, Tensor, float], Tensor]


def ce(model: Ensemble, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    attack = APGDAttack(model, n_iter=STEPS, norm="Linf", eps=eps, seed=0, device="cpu")
    found: Tensor = attack.perturb(x, labels)
    return found


def targeted(model: Ensemble, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    attack = APGDAttack_targeted(
        model, n_iter=STEPS, norm="Linf", eps=eps, seed=0, device="cpu", n_target_classes=9
    )
    found: Tensor = attack.perturb(x, labels)
    return found


def standing(model: Ensemble, x: Tensor, labels: Tensor) -> Mask:
    with torch.no_grad():
        return np.asarray((model(x).argmax(1) == labels).numpy())


@pytest.mark.parametrize(("attack", "reference"), [(OURS, ce), (TARGETED, targeted)])
@pytest.mark.parametrize("eps", [0.08, 0.12])
def test_as_many_images_fall_as_to_the_reference(
    ensemble: Ensemble,
    batch: tuple[Tensor, Tensor],
    attack: AdaptivePGD,
    reference: Reference,
    eps: float,
) -> None:
    x, labels = batch
    ours = standing(ensemble, attack(ensemble, x, labels, eps), labels)
    with torch.random.fork_rng():
        found = reference(ensemble, x, labels, eps)
    theirs = standing(ensemble, found, labels)
    assert 0.1 < ours.mean() < 0.9, "the radius says nothing"
    assert (ours != theirs).sum() <= 3
    assert mcnemar(ours, theirs)["p_value"] > 0.1
