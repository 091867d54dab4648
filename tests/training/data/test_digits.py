"""The digits: fixed splits, limits, and hashes that tell them apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.errors import UserError
from tests.training.networks import rows, stored
from training.config import Data
from training.data.splits import Split, load_test, load_training

DIGITS = Data(name="digits", mode="L", crop=(8, 8), pad=1, flip=False)


def test_digits_keep_360_test_images_that_training_never_sees() -> None:
    training, (labels, test) = load_training(DIGITS), load_test(DIGITS)
    assert labels == training.labels == tuple("0123456789")
    assert len(test) == 360
    assert len(training.train) + len(training.holdout) == 1797 - 360
    assert len(training.holdout) == round(0.1 * (1797 - 360))
    # The digits hold no duplicates, so equal pixels mean the same image.
    seen = Counter(rows(training.train) + rows(training.holdout) + rows(test))
    assert len(seen) == 1797
    assert set(seen.values()) == {1}
    for split in (stored(training.train), training.holdout, test):
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == (1, 8, 8)
        assert set(split.labels.tolist()) == set(range(10))
        assert len(split.images) == len(split.labels)


def test_digits_use_all_eight_bits_of_their_sixteen_levels() -> None:
    levels = set(load_test(DIGITS)[1].images.flatten().tolist())
    assert levels == {round(level * 255 / 16) for level in range(17)}


def test_the_splits_do_not_depend_on_any_seed() -> None:
    first = load_training(DIGITS)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    second = load_training(DIGITS)
    assert first.train.sha256 == second.train.sha256
    assert first.holdout.sha256 == second.holdout.sha256
    assert load_test(DIGITS)[1].sha256 == load_test(DIGITS)[1].sha256


def test_limits_take_a_fixed_part() -> None:
    small = load_training(replace(DIGITS, train_limit=200))
    assert (len(small.train), len(small.holdout)) == (180, 20)
    assert small.train.sha256 == load_training(replace(DIGITS, train_limit=200)).train.sha256
    whole = load_training(DIGITS)
    assert set(rows(small.train)) <= set(rows(whole.train) + rows(whole.holdout))
    _, test = load_test(replace(DIGITS, test_limit=50))
    assert len(test) == 50
    assert set(rows(test)) <= set(rows(load_test(DIGITS)[1]))
    assert len(load_test(replace(DIGITS, test_limit=5000))[1]) == 360
    assert len(load_training(replace(DIGITS, train_limit=5000)).train) == len(whole.train)


def test_too_few_images_for_every_class_are_refused() -> None:
    with pytest.raises(UserError, match=r"no training image left of class .*train_limit"):
        load_training(replace(DIGITS, train_limit=12))
    with pytest.raises(UserError, match="2 training images in 'digits'"):
        load_training(replace(DIGITS, train_limit=2))


@pytest.mark.parametrize("change", [{"crop": (16, 16)}, {"mode": "RGB"}, {"resize": (10, 10)}])
def test_a_set_of_images_keeps_its_own_shape(change: dict[str, Any]) -> None:
    """Otherwise training would see other images than the service makes."""
    for load in (load_training, load_test):
        with pytest.raises(UserError, match="'digits'"):
            load(replace(DIGITS, **change))


def test_the_hash_tells_pixels_labels_and_shape_apart() -> None:
    split = Split(torch.arange(16, dtype=torch.uint8).view(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    other_pixels = Split(split.images.flip(0), split.labels)
    other_labels = Split(split.images, split.labels.flip(0))
    other_shape = Split(split.images.view(4, 1, 1, 4), split.labels)
    hashes = {each.sha256 for each in (split, other_pixels, other_labels, other_shape)}
    assert len(hashes) == 4
    assert split.sha256 == Split(split.images.clone(), split.labels.clone()).sha256
