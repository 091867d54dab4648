"""Images and labels: the data sets, their fixed splits, and batches made on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve import images
from dverge_serve.errors import UserError
from dverge_serve.progress import Progress
from training.config import DOWNLOADED, Data
from training.seeds import generator

DIGITS_TEST = 360  # of 1,797, about a fifth
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Split:
    """Labelled images in memory.

    Args:
        images: uint8 `[N, channels, height, width]`.
        labels: int64 `[N]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor | slice) -> Split:
        """Return the chosen rows."""
        return Split(self.images[index], self.labels[index])

    @property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """What training may look at. The held-out part is for choosing; the test set is not here."""

    labels: tuple[str, ...]
    train: Split
    holdout: Split


def load_training(data: Data) -> TrainingData:
    """Load the training images and set the held-out part aside, the same part for every seed.

    Raises:
        UserError: missing or empty folders, unreadable images, a failed download, too few images.
    """
    labels, (pixels, targets) = _load(data, "train")
    order = torch.randperm(len(targets), generator=generator("holdout")).numpy()
    if data.train_limit:
        order = order[: data.train_limit]
    held = max(1, round(data.holdout * len(order)))
    if len(order) - held < 2:
        raise UserError(
            f"{len(order)} training images in '{data.path or data.name}'",
            "enough for training and a held-out part",
        )
    kept, out = np.sort(order[held:]), np.sort(order[:held])
    missing = [labels[index] for index in set(range(len(labels))) - set(targets[kept].tolist())]
    if missing:
        raise UserError(
            f"no training image left of class '{sorted(missing)[0]}' ({len(missing)} such)",
            "every class in the training part",
            "raise data.train_limit or lower data.holdout",
        )
    return TrainingData(
        labels, _split(pixels[kept], targets[kept]), _split(pixels[out], targets[out])
    )


def load_test(data: Data) -> tuple[tuple[str, ...], Split]:
    """Load the test images: class names and the split. Only verification calls this."""
    labels, (pixels, targets) = _load(data, "test")
    if data.test_limit and data.test_limit < len(targets):
        order = torch.randperm(len(targets), generator=generator("test")).numpy()
        chosen = np.sort(order[: data.test_limit])
        pixels, targets = pixels[chosen], targets[chosen]
    return labels, _split(pixels, targets)


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images as float32 in `[0,1]`, the same numbers the service computes."""
    return batch.float() / 255


def batches(
    split: Split, batch_size: int, data: Data, *names: int | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one shuffled, augmented epoch: float32 images `[B,C,H,W]` in `[0,1]` and labels `[B]`.

    Args:
        split: the images, on the device where the batches are made.
        batch_size: images a batch; the last may be smaller, but never a single image, which
            BatchNorm cannot normalise.
        data: the augmentation.
        names: what this epoch is, for the random generator (see `training.seeds`).
    """
    device = split.images.device
    draw = generator(*names, device=device)
    order = torch.randperm(len(split), generator=draw, device=device)
    for index in torch.split(order, batch_size):
        if len(index) > 1:
            chosen = split.take(index)
            yield to_float(augment(chosen.images, data, draw)), chosen.labels


def augment(batch: Tensor, data: Data, draw: torch.Generator) -> Tensor:
    """Return the batch `[B,C,H,W]` after random crop (zero padding) and horizontal flip."""
    count, _, height, width = batch.shape
    rows = torch.arange(height, device=batch.device).expand(count, -1)
    columns = torch.arange(width, device=batch.device).expand(count, -1)

    def random(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=draw, device=batch.device)

    if data.flip:
        columns = torch.where(random(2) == 1, columns.flip(1), columns)
    if data.pad:
        batch = torch.nn.functional.pad(batch, (data.pad,) * 4)
        rows, columns = rows + random(2 * data.pad + 1), columns + random(2 * data.pad + 1)
    each = torch.arange(count, device=batch.device)[:, None, None]
    # Indexing beside a slice moves the channels last in memory, where convolutions like them best;
    # permuting brings them back to second place in shape alone.
    return batch[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _split(pixels: npt.NDArray[np.uint8], targets: npt.NDArray[np.int64]) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(targets.copy()))


def _load(data: Data, part: str) -> tuple[tuple[str, ...], Arrays]:
    if data.name == "imagefolder":
        return _imagefolder(data, part)
    labels, pixels, targets = _digits(part) if data.name == "digits" else _torchvision(data, part)
    shape = data.preprocess.shape
    if pixels.shape[1:] != shape:
        raise UserError(
            f"'{data.name}' has images of shape {list(pixels.shape[1:])}, the recipe {list(shape)}",
            f"data.mode and data.crop as the images of '{data.name}' are",
        )
    if data.preprocess.resize != data.crop:
        raise UserError(
            f"data.resize = {list(data.preprocess.resize)}, but '{data.name}' is not resized",
            "no data.resize",
        )
    return labels, (pixels, targets)


def _digits(part: str) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    # Sixteen grey levels, quantised to the 8 bits that files and servers carry.
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = train_test_split(
        np.arange(len(pixels)), test_size=DIGITS_TEST, stratify=bunch.target, random_state=0
    )
    chosen = np.sort(train if part == "train" else test)
    labels = tuple(str(name) for name in bunch.target_names)
    return labels, pixels[chosen], bunch.target[chosen].astype(np.int64)


def _torchvision(
    data: Data, part: str
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from torchvision import datasets

    assert data.name in DOWNLOADED
    cache = Path(os.environ.get("DVERGE_CACHE") or Path.home() / ".cache" / "dverge")
    root = data.path or str(cache / "data")
    try:
        if data.name == "svhn":
            found = datasets.SVHN(root, split=part, download=True)
            targets, pixels, names = found.labels, found.data, [str(n) for n in range(10)]
        else:
            kinds = {
                "cifar10": datasets.CIFAR10,
                "cifar100": datasets.CIFAR100,
                "fashion-mnist": datasets.FashionMNIST,
            }
            found = kinds[data.name](root, train=part == "train", download=True)
            targets, pixels, names = found.targets, np.asarray(found.data), found.classes
            pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(
            f"cannot download '{data.name}' ({reason})",
            "a network connection",
            f"or put the data set under {root}, or give --data FOLDER with images",
        ) from error
    return tuple(names), pixels.astype(np.uint8), np.asarray(targets).astype(np.int64)


def class_folders(root: Path, part: str) -> dict[str, list[Path]]:
    """Return the image files of each class under `root/part/<class>/`, classes sorted by name.

    Raises:
        UserError: no such folder, fewer than two classes, or a class without an image.
    """
    folder = root / part
    layout = f"{root}/train/<class>/ and {root}/test/<class>/ with PNG, JPEG or WebP images"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", layout)
    classes = {
        item.name: sorted(
            file for file in item.rglob("*") if file.suffix.lower() in images.SUFFIXES
        )
        for item in sorted(folder.iterdir())
        if item.is_dir() and not item.name.startswith(".")
    }
    if len(classes) < 2:
        raise UserError(f"{len(classes)} class folders in {folder}", f"two or more: {layout}")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise UserError(
            f"no image in {folder / empty[0]} ({len(empty)} such classes)",
            "PNG, JPEG or WebP files in every class folder",
        )
    return classes


def _imagefolder(data: Data, part: str) -> tuple[tuple[str, ...], Arrays]:
    if not data.path:
        raise UserError("no data folder", "--data FOLDER with train/<class>/ and test/<class>/")
    root = Path(data.path)
    train, test = class_folders(root, "train"), class_folders(root, "test")
    if train.keys() != test.keys():
        odd = sorted(train.keys() ^ test.keys())
        where = "train" if odd[0] in train else "test"
        raise UserError(
            f"class '{odd[0]}' only under {root / where} ({len(odd)} classes differ)",
            "the same class folders under train and test",
        )
    classes = train if part == "train" else test
    files = [file for found in classes.values() for file in found]
    targets = np.repeat(np.arange(len(classes)), [len(found) for found in classes.values()])
    pixels = np.empty((len(files), *data.preprocess.shape), dtype=np.uint8)
    broken: list[str] = []

    def read(at: int) -> None:
        try:
            pixels[at] = images.load(files[at].read_bytes(), data.preprocess)
        except (images.ImageError, OSError) as error:
            broken.append(f"{files[at]} ({error})")

    with Progress(f"reading {part} images", len(files)) as progress, ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(files))):
            progress.advance()
    if broken:
        shown = ", ".join(sorted(broken)[:3])
        raise UserError(
            f"{len(broken)} of {len(files)} images in {root / part} cannot be read: {shown}",
            "whole PNG, JPEG or WebP files",
            "replace or remove them",
        )
    return tuple(classes), (pixels, targets.astype(np.int64))
