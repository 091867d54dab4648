"""Robust accuracy by the number of queries a caller may spend on an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from verification.attacks.attack import Attack
from verification.attacks.outcomes import Mask, Outcomes
from verification.attacks.query_attack import Answers, QueryAttack
from verification.config import SUBSTITUTE
from verification.metrics.statistics import rate

STEPS = (1, 2, 5)  # of each power of ten: the queries that a curve shows


def by_queries(
    outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]
) -> list[dict[str, Any]]:
    """Return robust accuracy under Q queries, for each radius and each kind of answers.

    A caller with Q queries an image chooses one attack, which may have been made for more queries
    and is then stopped: the figure is that of the attack that leaves the fewest images. It is of
    the images that this attack was run on, a random sample. `median` is the queries that half of
    the images it broke in the end were broken within.
    """
    rows = []
    for radius in eps:
        for answers in get_args(Answers):
            attacks = [
                attack
                for attack in suite
                if isinstance(attack, QueryAttack)
                and attack.answers == answers
                and (attack.name, radius) in outcome.queries
            ]
            if attacks:
                points = [
                    {"queries": queries, **_strongest(outcome, attacks, radius, queries)}
                    for queries in ladder(max(attack.queries for attack in attacks))
                ]
                last = next(each for each in attacks if each.name == points[-1]["attack"])
                broken = outcome.clean & ~outcome.robust([last], radius)
                spent = outcome.queries[last.name, radius][broken]
                median = float(np.median(spent)) if len(spent) else None
                rows.append({"eps": radius, "answers": answers, "median": median, "points": points})
    return rows


def under_substitute(
    outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]
) -> list[dict[str, Any]]:
    """Return robust accuracy under the attacks from the substitute, at each radius."""
    rows = []
    for radius in eps:
        attacks = [
            each for each in suite if each.source == SUBSTITUTE and outcome.has(each, radius)
        ]
        if attacks:
            sample = outcome.ran[attacks[0].name, radius]
            rows.append({"eps": radius, **rate(outcome.robust(attacks, radius)[sample])})
    return rows


def standing(outcome: Outcomes, attack: Attack, eps: float, queries: int) -> Mask:
    """Return which of the images it was run on survive that many queries of an attack, `[n]`."""
    late = outcome.queries[attack.name, eps] > queries
    robust = outcome.robust([attack], eps) | (outcome.robust([], eps) & late)
    return robust[outcome.ran[attack.name, eps]]


def ladder(most: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `most`, and `most`."""
    below = [step * 10**power for power in range(9) for step in STEPS if step * 10**power < most]
    return [*below, most]


def _strongest(
    outcome: Outcomes, attacks: Sequence[QueryAttack], eps: float, queries: int
) -> dict[str, Any]:
    found = [
        {"attack": attack.name, **rate(standing(outcome, attack, eps, queries))}
        for attack in attacks
    ]
    return min(found, key=lambda each: each["value"])
