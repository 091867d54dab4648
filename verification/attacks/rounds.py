"""Rounds of attacks on what stands, until a whole cycle over the losses breaks almost nothing.

The rounds of a suite are its Auto-PGD attacks with the gate `converged`, one loss after another and
again. A cycle is any run of them that has each loss once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Outcomes

CONVERGED = 0.005  # of all images: a cycle that breaks fewer is the last


class LastCycle(NamedTuple):
    """The last cycle that was run at a radius.

    Args:
        rounds: run so far, those before the cycle included.
        broken: images that the cycle broke.
        converged: whether they are few enough.
    """

    rounds: int
    broken: int
    converged: bool


def rounds(suite: Sequence[Attack]) -> list[AdaptivePGD]:
    """Return the rounds of a suite, in order."""
    return [each for each in suite if isinstance(each, AdaptivePGD) and each.gate == "converged"]


def last_cycle(suite: Sequence[Attack], outcome: Outcomes, eps: float) -> LastCycle | None:
    """Return the last cycle run at this radius; None before the first has ended."""
    chosen = rounds(suite)
    run = [each for each in chosen if outcome.has(each, eps)]
    size = len({each.loss for each in chosen})
    if not run or len(run) < size:
        return None
    attacked = np.any([outcome.ran[each.name, eps] for each in run[-size:]], axis=0)
    broken = int((attacked & ~outcome.robust(run[-size:], eps)).sum())
    return LastCycle(len(run), broken, broken < CONVERGED * len(outcome.clean))


def is_over(attack: Attack, suite: Sequence[Attack], outcome: Outcomes, eps: float) -> bool:
    """Return whether an attack is a round that an earlier cycle has made superfluous."""
    last = last_cycle(suite, outcome, eps)
    return attack in rounds(suite) and last is not None and last.converged
