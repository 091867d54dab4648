"""Annealed PGD, where Auto-PGD ends too early and where it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.verification.false_defences import Wrapped, digits, fine_steps, trained
from tests.verification.models import TorchEngine
from training.data.splits import Split, to_float
from training.pgd import Norm
from verification.attacks.annealed import AnnealedPGD
from verification.attacks.presets import Variant, suite
from verification.attacks.rounds import searches
from verification.attacks.suite import run_suite
from verification.attacks.target import Target

RADIUS = 0.1
ANNEALED = AnnealedPGD(name="annealed", threat="white_box", source="target", loss="cw", steps=100)


def left(model: nn.Module, split: Split, *kinds: str) -> float:
    """Return the share that the rounds of these kinds leave, all others left out."""
    found = searches(suite(Variant(preset="quick", classes=10, largest=RADIUS), []))
    chosen = [each for kind in kinds for each in found[kind]]
    target = {"model": Target(TorchEngine([model]), [model])}
    outcome = run_suite(chosen, {}, target, split, [RADIUS], seed=0)["model"]
    return float(outcome.robust(chosen, RADIUS).mean())


def truth(model: nn.Module, split: Split) -> float:
    """Return what many starts leave: momentum and steps that fall, 8 times 200 of them."""
    x0, labels = to_float(split.images), split.labels
    stands = model(x0).argmax(1) == labels
    right = nn.functional.one_hot(labels, 10).bool()
    draw = torch.Generator().manual_seed(1)
    for _ in range(8):
        x = (x0 + RADIUS * (2 * torch.rand(x0.shape, generator=draw) - 1)).clamp(0, 1)
        velocity = torch.zeros_like(x)
        for size in np.linspace(RADIUS / 2, 0.002, 200):
            x = x.detach().requires_grad_()
            logits = model(x)
            margin = logits.masked_fill(right, -torch.inf).amax(1) - logits[right]
            stands &= margin.detach() <= 0
            (slope,) = torch.autograd.grad(margin.sum(), x)
            velocity = 0.8 * velocity + slope / slope.abs().mean((1, 2, 3), keepdim=True)
            x = (x + size * velocity.sign()).clamp(x0 - RADIUS, x0 + RADIUS).clamp(0, 1)
    return float(stands.float().mean())


def test_where_scores_go_up_and_down_it_goes_on_where_auto_pgd_ends() -> None:
    model, split = Wrapped(fine_steps), digits(120)
    alone, both = left(model, split, "apgd"), left(model, split, "apgd", "annealed")
    assert both < alone - 0.05
    assert both <= truth(model, split) + 0.04


def test_where_scores_are_smooth_one_round_on_the_sample_finds_nothing() -> None:
    model, split = trained(1), digits(120)
    assert left(model, split, "apgd") == left(model, split, "apgd", "annealed")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_stays_in_the_ball_and_repeats_itself(norm: Norm) -> None:
    split, eps = digits(8), RADIUS if norm == "linf" else 8 * RADIUS
    images = to_float(split.images)
    attack = replace(ANNEALED, norm=norm, steps=20)
    found = attack(trained(1), images, split.labels, eps)
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert 0 < float(size.max()) <= eps + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(found, attack(trained(1), images, split.labels, eps))
