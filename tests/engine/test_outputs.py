"""What an ensemble's logits say, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dverge_serve.engine.outputs import Floats, Scores, softmax

MEMBER_LOGITS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6)),
    elements=st.floats(-50, 50, width=32),
)


@given(MEMBER_LOGITS)
def test_ranges(member_logits: Floats) -> None:
    scores = Scores(member_logits.mean(1), member_logits)
    members = member_logits.shape[1]
    np.testing.assert_allclose(scores.probabilities.sum(1), 1, atol=1e-9)
    assert ((scores.agreement >= 0) & (scores.agreement <= 1)).all()
    assert (scores.disagreement >= 0).all()
    assert (scores.disagreement <= np.log(members) + 1e-9).all()


def test_disagreement_of_certain_opposites_is_log_2() -> None:
    member_logits = np.array([[[100.0, 0.0], [0.0, 100.0]]], np.float32)
    scores = Scores(member_logits.mean(1), member_logits)
    assert scores.disagreement[0] == pytest.approx(np.log(2))
    assert scores.agreement[0] == 0.5


def test_members_that_agree_do_not_disagree() -> None:
    member_logits = np.repeat(np.array([[[3.0, 1.0, -2.0]]], np.float32), 4, axis=1)
    scores = Scores(member_logits.mean(1), member_logits)
    assert scores.disagreement[0] == pytest.approx(0, abs=1e-12)
    assert scores.agreement[0] == 1


def test_softmax_of_huge_logits_is_finite() -> None:
    np.testing.assert_allclose(softmax([1e4, 0.0, -1e4]), [1, 0, 0])
