"""Square: exact query counts, the ball, and the answer a linear model must give."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.verification.models import Linear, TorchEngine
from verification.attacks.square import Floats, square


class Counting:
    def __init__(self, values: list[int], nan: bool = False) -> None:
        pixels = np.array(values, np.float32)[:, None, None, None] / 255
        self.clean: Any = np.broadcast_to(pixels, (len(values), 1, 8, 8)).copy()
        self.labels = (np.array(values) > 127).astype(np.int64)
        self.engine, self.asked, self.nan = TorchEngine([Linear()]), 0, nan

    def __call__(self, images: Floats) -> Floats:
        self.asked += len(images)
        logits = self.engine.run_all(images).logits
        return np.full_like(logits, np.nan) if self.nan else logits

    def wrong(self, images: Floats) -> list[bool]:
        answers = self.engine.run_all(images).predictions
        return [bool(each) for each in answers != self.labels]


def test_it_finds_what_there_is_and_counts_every_query() -> None:
    model = Counting([120, 135, 200, 20])
    found = square(model, model.clean, model.labels, eps=0.05, queries=400, seed=0)
    assert model.wrong(found.images) == [True, True, False, False]
    assert model.asked == found.queries.sum()
    assert found.queries[2:].tolist() == [400, 400]
    assert found.queries[:2].max() < 400
    assert np.abs(found.images - model.clean).max() <= 0.05 + 1e-6
    assert found.images.min() >= 0
    assert found.images.max() <= 1


def test_more_queries_are_never_worse_for_the_attacker() -> None:
    model = Counting(list(range(110, 146)))
    broken = [
        sum(
            model.wrong(
                square(model, model.clean, model.labels, eps=0.05, queries=q, seed=1).images
            )
        )
        for q in (1, 20, 400)
    ]
    assert broken == sorted(broken)
    # 12.75 steps reach 22 values beyond the line from each side, corners at most.
    assert broken[-1] >= 20


def test_seed_and_neighbours() -> None:
    model = Counting([120, 135, 200])
    first = square(model, model.clean, model.labels, eps=0.05, queries=50, seed=3)
    again = square(model, model.clean, model.labels, eps=0.05, queries=50, seed=3)
    other = square(model, model.clean, model.labels, eps=0.05, queries=50, seed=4)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    alone = square(model, model.clean[:1], model.labels[:1], eps=0.05, queries=50, seed=3)
    assert np.array_equal(first.images[:1], alone.images)


def test_outputs_that_are_not_numbers_are_no_success() -> None:
    model = Counting([120, 135], nan=True)
    found = square(model, model.clean, model.labels, eps=0.05, queries=5, seed=0)
    assert found.queries.tolist() == [5, 5]


def test_nothing_to_attack_and_nothing_to_spend() -> None:
    model = Counting([120])
    assert not len(
        square(model, model.clean[:0], model.labels[:0], eps=0.1, queries=5, seed=0).images
    )
    assert square(model, model.clean, model.labels, eps=0.1, queries=0, seed=0).queries.sum() == 0
    assert model.asked == 0
