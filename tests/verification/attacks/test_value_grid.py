"""Attacks on the data's own values: what they accept."""

from __future__ import annotations

from typing import Any

import pytest

from dverge_serve.errors import UserError
from verification.attacks.value_grid import GridAttack


def test_settings_that_the_grid_does_not_know_are_refused() -> None:
    plain: dict[str, Any] = {"name": "g", "threat": "white_box", "source": "target"}
    GridAttack(**plain, levels=(0, 255))
    for odd in ({"diversity": 0.5}, {"skip_gamma": 0.2}, {"shuffles": 4}, {"norm": "l2"}):
        with pytest.raises(UserError):
            GridAttack(**plain, levels=(0, 255), **odd)
    with pytest.raises(UserError, match="two or more"):
        GridAttack(**plain, levels=(7,))
