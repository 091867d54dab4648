"""Transfer attacks as torchattacks writes them: the same images, or the same success.

foolbox's MI-FGSM is not compared: it does not normalise the gradient before it is accumulated.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from training.models.ensemble import Ensemble
from training.pgd import cross_entropy, momentum_rule, pgd_loop
from verification.attacks.gradient_attack import GradientAttack
from verification.metrics.statistics import rate

EPS, STEP_SIZE, STEPS = 0.2, 0.04, 10
MI = GradientAttack(name="mi", threat="transfer", source="s", momentum=1.0, random_start=False)


def right(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model(x).argmax(1)
    return answers == labels


@pytest.mark.parametrize("momentum", [1.0, 0.5])
def test_its_mi_fgsm_finds_the_images_that_ours_finds(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], momentum: float
) -> None:
    x0, labels = batch
    theirs = torchattacks.MIFGSM(ensemble, eps=EPS, alpha=STEP_SIZE, steps=STEPS, decay=momentum)
    ours = pgd_loop(
        cross_entropy(ensemble, labels),
        x0,
        eps=EPS,
        step_size=STEP_SIZE,
        steps=STEPS,
        rule=momentum_rule(momentum),
    )
    torch.testing.assert_close(theirs(x0, labels), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["di", "vmi"])
def test_its_images_transfer_as_ours_do(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], kind: str
) -> None:
    x0, labels = batch
    first, *others = ensemble
    source, target = Ensemble([first]).eval(), Ensemble(others).eval()
    shared = {"eps": EPS, "alpha": STEP_SIZE, "steps": STEPS, "decay": 1.0}
    theirs: torchattacks.attack.Attack
    if kind == "di":  # 8 pixels become up to 10
        theirs = torchattacks.DIFGSM(source, resize_rate=1.25, diversity_prob=0.5, **shared)
        ours = replace(MI, diversity=0.5)
    else:
        theirs = torchattacks.VMIFGSM(source, N=5, beta=1.5, **shared)
        ours = replace(MI, variance_samples=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = theirs(x0, labels)
    standing = [
        rate(right(target, each, labels).numpy()) for each in (found, ours(source, x0, labels, EPS))
    ]
    clean = float(right(target, x0, labels).double().mean())
    assert max(each["low"] for each in standing) <= min(each["high"] for each in standing)
    assert max(each["value"] for each in standing) < clean - 0.1
