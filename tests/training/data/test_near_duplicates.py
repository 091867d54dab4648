"""Near duplicates on both sides of the hold-out: the user is warned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.verification.test_leakage import pictures, saved
from training.data.near_duplicates import crossing
from training.data.splits import Split, TrainingData


def parts(train: torch.Tensor, holdout: torch.Tensor) -> TrainingData:
    one, other = (
        Split(images, torch.zeros(len(images), dtype=torch.int64)) for images in (train, holdout)
    )
    return TrainingData(("a", "b"), one, other)


@pytest.mark.parametrize(("copies", "warned"), [(0, False), (1, False), (2, True)])
def test_more_than_one_in_a_hundred_is_warned_of(copies: int, warned: bool) -> None:
    train, holdout = pictures(60, 0), pictures(100, 1)
    holdout[:copies] = saved(train[:copies], 90) if copies else holdout[:0]
    found = crossing(parts(train, holdout))
    assert len(found) == warned
    if warned:
        assert found[0].startswith("warning: 2 of 100 held-out images")
        assert "data.group" in found[0]


def test_images_equal_in_every_pixel_count_even_without_a_picture() -> None:
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    assert "4 of 4" in crossing(parts(grey, grey))[0]
    other = parts(grey, grey + 1)
    assert crossing(replace(other, holdout=Split(grey + 1, other.holdout.labels))) == []
