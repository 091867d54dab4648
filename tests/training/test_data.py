"""Data: fixed splits, batches, augmentation, folders of images and what is wrong with them."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dverge_serve import images
from dverge_serve.errors import UserError
from tests.training.networks import stored
from training.config import Data
from training.data import (
    Split,
    augment,
    batches,
    load_test,
    load_training,
    to_float,
)
from training.seeds import derive, generator
from training.sources import class_folders
from training.streaming import Streamed

DIGITS = Data(name="digits", mode="L", crop=(8, 8), pad=1, flip=False)


def rows(split: Split | Streamed) -> list[bytes]:
    return [image.numpy().tobytes() for image in stored(split).images]


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


def picture(level: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, level // 2, 0)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; four images each to train on and two to test on; one is of another size."""
    for part, count in (("train", 4), ("test", 2)):
        for place, name in enumerate(("ant", "bee")):
            where = tmp_path / part / name
            where.mkdir(parents=True)
            for number in range(count):
                (where / f"{number}.png").write_bytes(picture(100 * place + 10 * number))
    (tmp_path / "train" / "ant" / "deep").mkdir()
    (tmp_path / "train" / "ant" / "deep" / "tall.JPG").write_bytes(picture(9, (10, 40), "JPEG"))
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "readme.md").write_text("not a class")
    return tmp_path


def from_folder(path: Path, **more: Any) -> Data:
    return Data(name="imagefolder", path=str(path), crop=(8, 8), holdout=0.12, **more)


def test_a_folder_of_images_becomes_classes_and_pixels(folder: Path) -> None:
    data = load_training(from_folder(folder))
    assert data.labels == ("ant", "bee")
    assert len(data.train) + len(data.holdout) == 9
    every = torch.cat([stored(data.train).images, data.holdout.images])
    labels = torch.cat([data.train.labels, data.holdout.labels])
    assert Counter(labels.tolist()) == {0: 5, 1: 4}
    assert every.shape == (9, 3, 8, 8)
    plain = every[labels == 1]
    assert sorted(plain[:, 0, 3, 3].tolist()) == [100, 110, 120, 130]
    assert sorted(plain[:, 1, 3, 3].tolist()) == [50, 55, 60, 65]
    names, test = load_test(from_folder(folder))
    assert names == ("ant", "bee")
    assert sorted(test.images[:, 0, 0, 0].tolist()) == [0, 10, 100, 110]
    assert len(load_test(from_folder(folder, test_limit=3))[1]) == 3


def test_training_sees_what_the_service_will_see(folder: Path) -> None:
    data = from_folder(folder, resize=(12, 12))
    training = load_training(data)
    found = set(rows(training.train) + rows(training.holdout))
    for file in (folder / "train").rglob("*"):
        if file.suffix.lower() in images.SUFFIXES:
            assert images.load(file.read_bytes(), data.preprocess).tobytes() in found


def refusal(data: Data) -> str:
    with pytest.raises(UserError) as caught:
        load_training(data)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder_given() -> None:
    assert "--data FOLDER" in refusal(Data(name="imagefolder"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = refusal(from_folder(tmp_path / "nowhere"))
    assert f"no folder {tmp_path / 'nowhere' / 'train'}" in message
    assert "train/<class>/" in message


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("")
    assert "no folder" in refusal(from_folder(tmp_path))


def test_a_missing_test_folder_is_found_before_training(folder: Path) -> None:
    (folder / "test").rename(folder / "validation")
    assert f"no folder {folder / 'test'}" in refusal(from_folder(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert f"0 class folders in {tmp_path / 'train'}" in refusal(from_folder(tmp_path))


def test_a_single_class(folder: Path) -> None:
    for part in ("train", "test"):
        for file in (folder / part / "bee").iterdir():
            file.unlink()
        (folder / part / "bee").rmdir()
    assert "1 class folders" in refusal(from_folder(folder))


def test_a_class_with_no_image_is_named(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "notes.txt").write_text("none")
    message = refusal(from_folder(folder))
    assert f"no image in {folder / 'train' / 'cat'} (2 such classes)" in message


def test_classes_that_differ_between_train_and_test_are_named(folder: Path) -> None:
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    message = refusal(from_folder(folder))
    assert f"class 'bee' only under {folder / 'train'} (2 classes differ)" in message


def test_unreadable_images_are_named_and_counted(folder: Path) -> None:
    for number in range(4):
        (folder / "train" / "bee" / f"{number}.png").write_bytes(b"no image")
    whole = picture(3, (30, 30))
    (folder / "train" / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    message = refusal(from_folder(folder))
    assert "5 of 9 images" in message
    assert str(folder / "train" / "ant" / "0.png") in message
    assert str(folder / "train" / "bee" / "0.png") in message
    assert "bee/3.png" not in message  # three are enough to begin with
    assert "truncated" in message


def test_every_class_keeps_a_training_image(folder: Path) -> None:
    message = refusal(from_folder(folder, train_limit=3))
    assert "no training image left of class" in message or "3 training images" in message


def test_classes_are_sorted_by_name(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "Aardvark").mkdir()
        (folder / part / "Aardvark" / "a.webp").write_bytes(picture(1, kind="WEBP"))
    assert list(class_folders(folder, "train")) == ["Aardvark", "ant", "bee"]


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
    assert "--data FOLDER" in message


def test_a_limit_decodes_no_more_images_than_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, name, at in itertools.product(("train", "test"), ("a", "b"), range(20)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), at).save(folder / f"{at}.png")
    decoded: list[int] = []
    load = images.load

    def counted(*given: Any, **named: Any) -> Any:
        decoded.append(1)
        return load(*given, **named)

    monkeypatch.setattr(images, "load", counted)
    data = Data(path=str(tmp_path), mode="L", crop=(8, 8), train_limit=12, test_limit=5)
    training = load_training(data)
    assert len(training.train) + len(training.holdout) == len(decoded) == 12
    assert len(load_test(data)[1]) == 5
    assert len(decoded) == 17
