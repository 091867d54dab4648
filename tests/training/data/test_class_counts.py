"""How many images each class has, and the warnings about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dverge_serve.progress import Progress
from tests.training.networks import tiny_config
from training.data.class_counts import balance, class_counts
from training.data.splits import Split, TrainingData, load_training
from training.trainer import train


def split(*counts: int) -> Split:
    """Return black images with so many of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Split(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels)


def data(train: tuple[int, ...], holdout: tuple[int, ...]) -> TrainingData:
    names = tuple(f"class{number}" for number in range(len(train)))
    return TrainingData(names, split(*train), split(*holdout))


def test_counts_and_ratio_are_told_in_one_line() -> None:
    found = balance(data((40, 1200, 400), (4, 120, 40)))
    assert found[0] == (
        "1,640 training images of 3 classes, the largest 30.0 times the smallest: "
        "class1: 1,200, class2: 400, class0: 40"
    )


@pytest.mark.parametrize(("largest", "warned"), [(100, False), (300, False), (301, True)])
def test_imbalance_past_three_to_one_is_warned_of(largest: int, warned: bool) -> None:
    found = balance(data((100, largest), (1, 1)))
    assert len(found) == 1 + warned
    if warned:
        assert found[1].startswith("warning: imbalanced classes, 'class1' 301 to 'class0' 100")


def test_classes_without_held_out_images_are_warned_of() -> None:
    found = balance(data((10, 10, 10, 10), (2, 0, 1)))
    assert len(found) == 2
    assert "no held-out image of 'class1' (2 such classes)" in found[1]


def test_of_many_classes_the_ends_are_shown() -> None:
    counts = tuple(range(101, 201))
    found = balance(data(counts, (1,) * 100))
    assert len(found) == 1
    assert found[0].endswith(
        "class99: 200, class98: 199, class97: 198, class96: 197, class95: 196, class94: 195, ..., "
        "class5: 106, class4: 105, class3: 104, class2: 103, class1: 102, class0: 101"
    )


def test_training_tells_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "shown", True)
    config = tiny_config()
    run = train(config, tmp_path / "run", device=torch.device("cpu"))
    loaded = load_training(config.data)
    labels = loaded.train.labels.tolist()
    counts = {str(name): labels.count(name) for name in range(10)}
    assert class_counts(loaded) == run.checkpoint["class_counts"] == counts
    told = capfd.readouterr().err.splitlines()
    assert set(balance(loaded)) <= set(told)
