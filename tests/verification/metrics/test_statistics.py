"""Statistics against textbook values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verification.metrics.statistics import auroc, mcnemar, quantile_above, rate


def test_wilson_interval_is_the_textbook_one() -> None:
    found = rate(np.array([True] * 50 + [False] * 50))
    assert found["value"] == 0.5
    assert found["low"] == pytest.approx(0.4038, abs=1e-4)
    assert found["high"] == pytest.approx(0.5962, abs=1e-4)
    assert rate(np.zeros(0, bool))["value"] is None


def test_mcnemar_is_the_sign_test_on_images_only_one_gets_right() -> None:
    ours = np.array([1] * 8 + [0] * 1 + [1] * 20 + [0] * 5, bool)
    theirs = np.array([0] * 8 + [1] * 1 + [1] * 20 + [0] * 5, bool)
    found = mcnemar(ours, theirs)
    assert (found["only_this"], found["only_other"]) == (8, 1)
    assert found["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(ours, ours)["p_value"] == 1.0


@settings(max_examples=50, deadline=None)
@given(
    clean=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    attacked=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(
    clean: list[int], attacked: list[int]
) -> None:
    pairs = [(a > c) + 0.5 * (a == c) for c in clean for a in attacked]
    found = auroc(np.array(clean, float), np.array(attacked, float))
    assert found["value"] == pytest.approx(sum(pairs) / len(pairs))
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_auroc_interval_ends_where_what_was_found_is_just_likely() -> None:
    rng = np.random.default_rng(0)
    found = auroc(rng.normal(0, 1, 58), rng.normal(1.757, 1, 51))
    for end in (found["low"], found["high"]):
        others = (58 + 51) / 2 - 1
        spread = end * (1 - end) / (58 * 51)
        spread *= 1 + others * (1 - end) / (2 - end) + others * end / (1 + end)
        assert abs(found["value"] - end) == pytest.approx(1.96 * spread**0.5, rel=1e-3)


def test_auroc_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, held = 0.921, 0  # of two normal distributions two standard deviations apart
    for _ in range(400):
        found = auroc(rng.normal(0, 1, 60), rng.normal(2, 1, 25))
        held += found["low"] <= truth <= found["high"]
    assert 0.92 <= held / 400 <= 0.99


def test_auroc_of_few_images_is_never_certain() -> None:
    assert auroc(np.zeros(300), np.ones(1))["low"] < 0.6
    assert auroc(np.ones(300), np.zeros(2))["high"] > 0.3
    assert auroc(np.zeros(3), np.zeros(0))["value"] is None


def test_quantile_above_is_exceeded_by_at_most_that_share() -> None:
    scores = np.arange(200.0)
    for share in (0.01, 0.05):
        assert (scores > quantile_above(scores, share)).mean() <= share
        assert (scores > quantile_above(scores, share)).mean() >= share - 1.5 / 200
