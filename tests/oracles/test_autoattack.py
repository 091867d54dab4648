"""The reference of `--preset full` as the product runs it: AutoAttack from pyautoattack."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from training.models.ensemble import Ensemble
from training.pgd import Norm
from verification.attacks.autoattack import AutoAttack, available
from verification.attacks.presets import Variant, left_out, suite

REFERENCE = AutoAttack(name="autoattack", threat="white_box", source="target")


class Stripes(nn.Module):
    """The class is the brightest of the image's rows.

    Where two rows differ by `d`, an Linf attack succeeds above eps `d / 2` and never below.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.mean((1, 3))


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("classes", [2, 4])  # two are too few for its targeted attacks
def test_it_breaks_what_can_be_broken(classes: int) -> None:
    x0 = torch.full((2, 1, classes, 2), 0.4)
    x0[0, :, 0] += 0.15
    x0[1, :, 0] += 0.25
    labels = torch.zeros(2, dtype=torch.int64)
    found = REFERENCE(Stripes(), x0, labels, 0.1)
    assert float((found - x0).abs().max()) <= 0.1 + 1e-6
    assert (Stripes()(found).argmax(1) == labels).tolist() == [False, True]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.3), ("l2", 2.0)])
def test_it_breaks_an_ensemble_and_leaves_no_trace(
    ensemble: Ensemble, batch: tuple[Tensor, Tensor], norm: Norm, eps: float
) -> None:
    x0, labels = (part[:16] for part in batch)
    attack = replace(REFERENCE, norm=norm)
    state, level = torch.get_rng_state(), logging.getLogger("auto-attack").level
    found = attack(ensemble, x0, labels, eps, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("auto-attack").level == level
    change = (found - x0).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert 0 < float(size.max()) <= eps + 1e-5
    assert accuracy(ensemble, x0, labels) > 0.8
    assert accuracy(ensemble, found, labels) == 0
    assert torch.equal(attack(ensemble, x0, labels, eps, seed=3), found)


def test_the_full_preset_has_it_where_the_package_is_installed() -> None:
    variant = Variant(preset="full", classes=10, reference=available())
    assert "autoattack" in {attack.name for attack in suite(variant, ["a"])}
    assert "AutoAttack" not in left_out(variant)
