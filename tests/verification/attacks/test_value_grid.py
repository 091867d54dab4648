"""Attacks on the data's own values: what they accept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from tests.verification.models import Linear
from verification.attacks.value_grid import GridAttack, InkAttack, grid_attacks


def test_settings_that_the_grid_does_not_know_are_refused() -> None:
    plain: dict[str, Any] = {"name": "g", "threat": "white_box", "source": "target"}
    GridAttack(**plain, levels=(0, 255))
    for odd in ({"diversity": 0.5}, {"skip_gamma": 0.2}, {"shuffles": 4}, {"norm": "l2"}):
        with pytest.raises(UserError):
            GridAttack(**plain, levels=(0, 255), **odd)
    with pytest.raises(UserError, match="two or more"):
        GridAttack(**plain, levels=(7,))


def test_attacks_in_ink_leave_the_background_alone() -> None:
    levels, eps = (0, 64, 128, 192, 255), 0.3
    x = torch.zeros(3, 1, 8, 8)
    x[:, :, 2:6, 2:6] = 128 / 255
    labels = torch.ones(3, dtype=torch.long)  # the mean is below one half: class 0
    for attack in grid_attacks(levels, ["a", "b"], "linf"):
        made = attack(Linear(), x, 1 - labels, eps)
        inside, outside = made[:, :, 2:6, 2:6], made.clone()
        outside[:, :, 2:6, 2:6] = 0
        assert torch.allclose(inside, torch.tensor(192 / 255)), attack.name
        ink = isinstance(attack, InkAttack)
        assert ink == attack.name.count("in ink")
        assert bool((outside == 0).all()) == ink, attack.name
