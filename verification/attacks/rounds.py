"""Rounds of attacks on what stands, until a whole cycle of them breaks almost nothing.

The rounds of a suite are its attacks by Auto-PGD and annealed PGD with the gate `converged`. Each
kind is a search of its own: one loss after another, and again. A cycle is any run of its rounds
that has each loss once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Outcomes

CONVERGED = 0.005  # of the images that the round may be run on: a cycle that breaks fewer ends it


class LastCycle(NamedTuple):
    """The last cycle of a search that was run at a radius.

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


def searches(suite: Sequence[Attack]) -> dict[str, list[AdaptivePGD]]:
    """Return the rounds of a suite by their kind, in order."""
    found: dict[str, list[AdaptivePGD]] = {}
    for each in rounds(suite):
        found.setdefault(each.kind, []).append(each)
    return found


def cycle_length(search: Sequence[AdaptivePGD]) -> int:
    """Return how many rounds a cycle has."""
    return len({each.loss for each in search})


def later_rounds(suite: Sequence[Attack]) -> list[AdaptivePGD]:
    """Return the rounds after each search's first cycle: few images are left to them, or none."""
    return [each for one in searches(suite).values() for each in one[cycle_length(one) :]]


def last_cycle(search: Sequence[AdaptivePGD], outcome: Outcomes, eps: float) -> LastCycle | None:
    """Return the last cycle of a search at this radius; None before the first has ended."""
    run = [each for each in search if outcome.has(each, eps)]
    size = cycle_length(search)
    if not run or len(run) < size:
        return None
    attacked = np.any([outcome.ran[each.name, eps] for each in run[-size:]], axis=0)
    broken = int((attacked & ~outcome.robust(run[-size:], eps)).sum())
    count = len(outcome.clean)
    return LastCycle(len(run), broken, broken < CONVERGED * min(run[-1].sample or count, count))


def is_over(attack: Attack, suite: Sequence[Attack], outcome: Outcomes, eps: float) -> bool:
    """Return whether an attack is a round that an earlier cycle has made superfluous."""
    search = searches(suite).get(attack.kind, [])
    last = last_cycle(search, outcome, eps)
    return attack in search and last is not None and last.converged
