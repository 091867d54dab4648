"""Robust accuracy by queries, from outcomes written by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Outcomes
from verification.attacks.rays import RayS
from verification.attacks.square import Square
from verification.config import SUBSTITUTE
from verification.metrics.by_queries import by_queries, ladder, under_substitute

EPS = 0.1
SHORT, LONG = (Square(name=f"square {each}", queries=each) for each in (10, 100))
RAYS = RayS(name="rays", queries=20)


def outcome(*attacked: tuple[str, str, list[int]]) -> Outcomes:
    """Six images, the first wrong when clean; `-` is outside the sample, queries for the others."""
    found = Outcomes({}, np.array([False, *[True] * 5]), np.zeros(6, bool))
    for name, survived, spent in attacked:
        ran = np.array([mark != "-" for mark in survived])
        for version in ("float", "delivered"):
            found.survived[name, EPS, version] = np.array([mark != "0" for mark in survived])
        found.ran[name, EPS] = ran
        found.queries[name, EPS] = np.zeros(6, np.int64)
        found.queries[name, EPS][ran] = spent
    return found


def values(table: dict[str, object]) -> dict[int, tuple[str, float]]:
    points = table["points"]
    assert isinstance(points, list)
    return {each["queries"]: (each["attack"], each["value"]) for each in points}


def test_an_image_counts_until_its_last_query() -> None:
    found = outcome(("rays", "00-110", [1, 7, 20, 20, 3]))
    (table,) = by_queries(found, [RAYS], [EPS])
    assert (table["eps"], table["answers"], table["median"]) == (EPS, "labels", 5.0)
    # Of five images one is wrong untouched, one falls at query 3 and one at query 7.
    expected = {1: 0.8, 2: 0.8, 5: 0.6, 10: 0.4, 20: 0.4}
    assert values(table) == {queries: ("rays", value) for queries, value in expected.items()}
    assert {point["n"] for point in table["points"]} == {5}
    assert table["points"][0]["low"] < 0.8 < table["points"][0]["high"]


def test_the_figure_is_that_of_the_attack_that_leaves_the_fewest() -> None:
    found = outcome(
        ("square 10", "011100", [1, 10, 10, 10, 4, 4]),
        ("square 100", "000110", [1, 60, 3, 100, 100, 70]),
    )
    (table,) = by_queries(found, [SHORT, LONG], [EPS])
    got = values(table)
    assert got[5] == ("square 10", 3 / 6)
    assert got[10] == ("square 10", 3 / 6)
    assert got[100] == ("square 100", 2 / 6)
    kept = [value for _, value in got.values()]
    assert kept == sorted(kept, reverse=True)


def test_scores_and_labels_have_their_own_rows_and_what_was_not_run_has_none() -> None:
    found = outcome(("rays", "111111", [20] * 6), ("square 10", "111111", [10] * 6))
    rows = by_queries(found, [SHORT, RAYS, LONG], [EPS, 0.2])
    assert [(row["eps"], row["answers"]) for row in rows] == [(EPS, "scores"), (EPS, "labels")]
    assert [row["median"] for row in rows] == [None, None]


def test_the_ladder_ends_at_the_budget() -> None:
    assert ladder(1) == [1]
    assert ladder(100) == [1, 2, 5, 10, 20, 50, 100]
    assert ladder(130) == [1, 2, 5, 10, 20, 50, 100, 130]


def test_a_substitutes_attacks_count_together_on_their_sample() -> None:
    first = GradientAttack(name="ce", threat="queries", source=SUBSTITUTE)
    both = [first, replace(first, name="cw", loss="cw")]
    found = outcome(("ce", "-0-111", [0] * 4), ("cw", "-1-011", [0] * 4))
    (row,) = under_substitute(found, both, [EPS, 0.2])
    assert (row["eps"], row["value"], row["n"]) == (EPS, 0.5, 4)
    assert under_substitute(found, [RAYS], [EPS]) == []
