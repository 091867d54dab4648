"""The learning curve's training sets: so many of each class, smaller ones within larger ones."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.learning_curve import curve, first_of_each_class
from tests.training.networks import tiny_config
from training.data.splits import load_training


def test_smaller_sets_are_parts_of_larger_ones() -> None:
    labels = torch.arange(300) % 3
    labels[:40] = 3  # a class with few
    few, many = (first_of_each_class(labels, count) for count in (20, 60))
    assert torch.bincount(labels[few]).tolist() == [20] * 4
    assert torch.bincount(labels[many]).tolist() == [60, 60, 60, 40]
    assert set(few.tolist()) < set(many.tolist())


def test_each_count_gets_the_same_number_of_gradients(tmp_path: Path) -> None:
    config = tiny_config(
        method="standard", members=1, standard__epochs=400, standard__budget=120, batch_size=16
    )
    one, other = curve(config, load_training(config.data), [2, 4], 1, tmp_path)
    assert [one["images"], other["images"]] == [20, 40]
    assert [one["epochs"], other["epochs"]] == [6, 3]
    assert one["lowest"] == one["accuracy"] == one["highest"]
