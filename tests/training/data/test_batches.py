"""Batches: every image once an epoch, augmented, by seeds that have names."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dverge_serve import images
from training.config import Data
from training.data.splits import Split, augment, batches, to_float
from training.seeds import derive, generator


def numbered(count: int, size: int = 4, channels: int = 1) -> Split:
    """Return images that are each one constant level, their number."""
    levels = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(levels.expand(count, channels, size, size).contiguous(), torch.arange(count))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 60), batch_size=st.integers(2, 20), epoch=st.integers(0, 9))
def test_an_epoch_covers_every_image_once(count: int, batch_size: int, epoch: int) -> None:
    data = Data(pad=0, flip=False)
    found = list(batches(numbered(count), batch_size, data, 0, "test", epoch))
    labels = torch.cat([part for _, part in found]).tolist()
    sizes = [len(part) for _, part in found]
    assert len(set(labels)) == len(labels)
    alone = count % batch_size == 1  # BatchNorm cannot normalise a single image
    assert len(labels) == count - alone
    assert set(sizes[:-1]) <= {batch_size}
    assert min(sizes) > 1
    for batch, part in found:
        assert batch.dtype == torch.float32
        assert torch.equal(batch[:, 0, 0, 0], to_float(part + 1))


def test_each_epoch_has_its_own_order_which_comes_again() -> None:
    def order(*names: int | str) -> list[int]:
        found = batches(numbered(50), 8, Data(pad=0, flip=False), *names)
        return torch.cat([labels for _, labels in found]).tolist()

    orders = [order(seed, epoch, part) for seed in (0, 1) for epoch in (0, 1) for part in "st"]
    assert len({tuple(each) for each in orders}) == 8
    assert order(0, 1, "s") == order(0, 1, "s")


def windows(image: Tensor, pad: int, flip: bool) -> set[bytes]:
    """Every image that cropping and flipping can make of this one."""
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    _, height, width = image.shape
    crops = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    ]
    return {crop.tobytes() for crop in crops} | (
        {crop[:, :, ::-1].tobytes() for crop in crops} if flip else set()
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_are_windows_of_the_zero_padded_image(
    channels: int, pad: int, flip: bool
) -> None:
    draw = generator("augment")
    batch = torch.randint(1, 256, (200, channels, 3, 5), generator=draw, dtype=torch.uint8)
    found = augment(batch, Data(pad=pad, flip=flip), draw)
    assert found.shape == batch.shape
    assert found.dtype == torch.uint8
    for before, after in zip(batch, found, strict=True):
        assert after.numpy().tobytes() in windows(before, pad, flip)


def test_every_window_comes_and_half_of_the_images_are_flipped() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(6000, -1, -1, -1)
    found = augment(image, Data(pad=1, flip=True), generator("windows"))
    counts = Counter(each.numpy().tobytes() for each in found)
    assert set(counts) == windows(image[0], 1, True)
    assert min(counts.values()) > 6000 / 18 * 0.7
    flipped = augment(image, Data(pad=0, flip=True), generator("flips"))[:, 0, 0, 0] == 3
    assert 0.47 < float(flipped.float().mean()) < 0.53


def test_augmentation_off_changes_nothing() -> None:
    batch = torch.arange(64, dtype=torch.uint8).view(4, 1, 4, 4)
    assert torch.equal(augment(batch, Data(pad=0, flip=False), generator("off")), batch)


def test_floats_are_the_numbers_the_service_computes() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_float(torch.from_numpy(levels)).numpy(), images.to_float(levels))


def test_seeds_depend_on_every_name_and_nothing_else() -> None:
    names: list[tuple[int | str, ...]] = [(0,), ("0",), (0, 1), (1, 0), ("a", "b"), ("ab",), ()]
    assert len({derive(*each) for each in names}) == len(names)
    assert derive(3, "source") == derive(3, "source")
    assert 0 <= derive("any") < 2**63
    one, other = generator(1), generator(1)
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))
