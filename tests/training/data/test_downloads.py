"""Sets that torchvision downloads, without the download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.refusal import refusal
from training.config import Data
from training.data.splits import load_test, load_training


class FakeCifar:
    """What torchvision's class shows of its data, without the download."""

    roots: list[str]

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        assert download
        FakeCifar.roots.append(root)
        count = 40 if train else 6
        levels = np.arange(count * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8)
        self.data = levels.reshape(count, 32, 32, 3)
        self.targets = [number % 2 for number in range(count)]
        self.classes = ["cat", "dog"]


def test_downloaded_images_come_channels_first_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchvision import datasets

    FakeCifar.roots = []
    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    monkeypatch.setenv("DVERGE_CACHE", str(tmp_path))
    labels, test = load_test(Data(name="cifar10"))
    assert labels == ("cat", "dog")
    assert test.images.shape == (6, 3, 32, 32)
    assert test.labels.tolist() == [0, 1, 0, 1, 0, 1]
    expected = FakeCifar("", train=False, download=True).data[2, 5, 7]
    assert test.images[2, :, 5, 7].tolist() == expected.tolist()
    assert len(load_training(Data(name="cifar10", path="/elsewhere")).train) == 36
    assert FakeCifar.roots == [str(tmp_path / "data"), "", "/elsewhere"]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("File not found")])
def test_a_download_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from torchvision import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "SVHN", fail)
    message = refusal(Data(name="svhn"))
    assert "cannot download 'svhn'" in message
    assert "`data` a folder" in message
