"""Radii by search: where an undefended control falls to half of its accuracy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dverge_serve.errors import UserError
from tests.verification.models import Linear, linear_split
from verification.auto_radii import halving_radii


class Deaf(Linear):
    """Answers by pixels that no attack may change so far."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return super().score(x).detach() * 0 + 1.0


def surrogate(*members: torch.nn.Module) -> Any:
    return SimpleNamespace(members=list(members))


# Images this many 8-bit steps from the threshold, which lies between 127 and 128.
NEAR, FAR = [124, 131, 120, 135], [60, 195, 40, 215]


def test_the_control_is_halved_at_the_radius_in_the_middle() -> None:
    split = linear_split(NEAR + FAR)
    surrogates = [surrogate(Linear()), surrogate(Linear(scale=5.0))]
    half, whole, twice = halving_radii(None, surrogates, split, "linf", 0)
    assert whole == 8 / 255  # the four near images, 3.5 and 7.5 steps away, have crossed
    assert (half, twice) == (4 / 255, 16 / 255)


def test_a_lone_surrogate_is_attacked_with_its_own_weights() -> None:
    split = linear_split([127, 128, 127, 128])
    assert halving_radii(None, [surrogate(Linear())], split, "linf", 0) == (1 / 255, 2 / 255)


def test_l2_radii_are_lengths() -> None:
    split = linear_split(NEAR + FAR)
    radii = halving_radii(None, [surrogate(Linear())], split, "l2", 0)
    assert radii == pytest.approx([8 / 255 * n for n in (4, 8, 16)])  # of 64 pixels


def test_a_control_that_never_falls_is_told() -> None:
    split = linear_split([200, 210])
    with pytest.raises(UserError, match="`eps` auto: the control keeps more than half"):
        halving_radii(None, [surrogate(Deaf())], split, "linf", 0)
