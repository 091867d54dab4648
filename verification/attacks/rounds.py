"""Rounds of attacks on what stands, until a whole cycle over the losses breaks almost nothing.

The rounds of a suite are its Auto-PGD attacks with the gate `converged`; a cycle ends where a loss
comes again.
"""

from __future__ import annotations

from collections.abc import Sequence

from verification.attacks.apgd import AdaptivePGD
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Outcomes

CONVERGED = 0.005  # of all images: a cycle that breaks fewer is the last


def cycles(suite: Sequence[Attack]) -> list[list[AdaptivePGD]]:
    """Return the rounds of a suite, cycle by cycle."""
    found: list[list[AdaptivePGD]] = []
    for attack in suite:
        if isinstance(attack, AdaptivePGD) and attack.gate == "converged":
            if not found or attack.loss in {each.loss for each in found[-1]}:
                found.append([])
            found[-1].append(attack)
    return found


def broken_by(cycle: Sequence[Attack], outcome: Outcomes, eps: float) -> int | None:
    """Return how many images the attacks of a cycle broke; None if not all were run."""
    if not all(outcome.has(attack, eps) for attack in cycle):
        return None
    began = outcome.ran[cycle[0].name, eps]
    return int((began & ~outcome.robust(cycle, eps)).sum())


def last_cycle(
    suite: Sequence[Attack], outcome: Outcomes, eps: float
) -> tuple[int, int, bool] | None:
    """Return the number of the last cycle run, what it broke, and whether that is little enough.

    None if no cycle was run.
    """
    counts = [broken_by(cycle, outcome, eps) for cycle in cycles(suite)]
    run = [count for count in counts if count is not None]
    return (len(run), run[-1], run[-1] < CONVERGED * len(outcome.clean)) if run else None


def is_over(attack: Attack, suite: Sequence[Attack], outcome: Outcomes, eps: float) -> bool:
    """Return whether an attack is a round that an earlier cycle has made superfluous."""
    rounds = [each for cycle in cycles(suite) for each in cycle]
    last = last_cycle(suite, outcome, eps)
    return attack in rounds and last is not None and last[2]
