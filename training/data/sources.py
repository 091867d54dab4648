"""Data sets: the embedded digits, torchvision's data sets, folders of image files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dverge_serve import images
from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder
from dverge_serve.progress import Progress
from training.config import DOWNLOADED, Data
from training.data.image_folder import read_folder
from training.seeds import generator

MOST_REST = 5000  # images
DIGITS_TEST = 360  # of 1,797, about a fifth
Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def read(data: Data, part: str) -> tuple[tuple[str, ...], Arrays]:
    """Return class names, images and labels of `part` of a data set.

    A limit is drawn at random, the same images each time, before any file is decoded.

    Args:
        data: which images.
        part: `train`, `test`, or `rest`: the test images that the limit leaves out.

    Raises:
        UserError: missing or empty folders, unreadable images, a failed download.
    """
    if data.name == "imagefolder":
        names, files = image_files(data, part)
        return names, files.read()
    load = _digits if data.name == "digits" else _torchvision
    labels, pixels, targets = load(data, "train" if part == "train" else "test")
    chosen = _chosen(len(targets), data, part)
    return labels, (pixels[chosen], targets[chosen])


def _chosen(count: int, data: Data, part: str) -> npt.NDArray[np.int64]:
    limit = data.train_limit if part == "train" else data.test_limit
    limit = limit if 0 < limit < count else count
    if part == "rest":
        return np.sort(_drawn(count, "test")[limit : limit + MOST_REST])
    return np.sort(_drawn(count, part)[:limit])


def _drawn(count: int, part: str) -> npt.NDArray[np.int64]:
    return np.asarray(torch.randperm(count, generator=generator(part)).numpy())


def _digits(
    _: Data, part: str
) -> tuple[tuple[str, ...], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
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
    root = data.path or str(cache_folder() / "data")
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
            f"or put the data set under {root}, or give `data` a folder of images",
        ) from error
    return tuple(names), pixels.astype(np.uint8), np.asarray(targets).astype(np.int64)


def image_files(data: Data, part: str) -> tuple[tuple[str, ...], ImageFiles]:
    """Return class names and files of a folder of images, as `read`; nothing is decoded yet.

    Raises:
        UserError: missing or empty folders, or classes that differ between the parts.
    """
    if not data.path:
        raise UserError("no data folder", "`data` FOLDER with train/<class>/ and test/<class>/")
    found = read_folder(Path(data.path), data.group)
    classes = found.train if part == "train" else found.test
    paths = [file for files in classes.values() for file in files]
    targets = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
    where = "train" if part == "train" else "test"
    groups = [found.groups[file] for file in paths] if part == "train" and found.groups else []
    folder = found.root / where
    files = ImageFiles(
        folder, paths, targets.astype(np.int64), data.preprocess, groups, found.notes
    )
    return tuple(classes), files.take(_chosen(len(paths), data, part))


@dataclass(frozen=True)
class ImageFiles:
    """Labelled image files, not decoded yet.

    Args:
        folder: that they lie in, for messages.
        paths: of `N` files.
        targets: classes, int64 `[N]`.
        preprocess: how they become the model's input.
        groups: that belong together, of `N` files; or none.
        notes: what a user must know of the folder, a line each.
    """

    folder: Path
    paths: list[Path]
    targets: npt.NDArray[np.int64]
    preprocess: images.Preprocess
    groups: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def take(self, rows: npt.NDArray[np.int64]) -> ImageFiles:
        """Return the chosen rows."""
        paths = [self.paths[at] for at in rows]
        groups = [self.groups[at] for at in rows] if self.groups else []
        return replace(self, paths=paths, targets=self.targets[rows], groups=groups)

    def read(self) -> Arrays:
        """Decode all: images uint8 `[N, C, H, W]` and classes.

        Raises:
            UserError: images that cannot be read.
        """
        count = len(self.paths)
        pixels = np.empty((count, *self.preprocess.shape), dtype=np.uint8)
        broken: list[str] = []

        def one(at: int) -> None:
            (pixels[at],), unread = decode(self.paths[at : at + 1], self.preprocess)
            broken.extend(unread)

        label = f"reading {self.folder.name} images"
        with Progress(label, count) as progress, ThreadPoolExecutor() as pool:
            for _ in pool.map(one, range(count)):
                progress.advance()
        refuse_broken(broken, count, self.folder)
        return pixels, self.targets


def decode(
    paths: Sequence[Path], preprocess: images.Preprocess
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Return the images uint8 `[n, C, H, W]`, and a line about each file that holds none."""
    pixels = np.zeros((len(paths), *preprocess.shape), dtype=np.uint8)
    broken = []
    for at, path in enumerate(paths):
        try:
            pixels[at] = images.to_pixels(path, preprocess)
        except (images.ImageError, OSError) as error:
            broken.append(f"{path} ({error})")
    return pixels, broken


def refuse_broken(broken: Sequence[str], count: int, folder: Path) -> None:
    """Raise a UserError that names the first few of the files that cannot be read, if any."""
    if broken:
        raise UserError(
            f"{len(broken)} of {count} images in {folder} cannot be read: "
            + ", ".join(sorted(broken)[:3]),
            "whole PNG, JPEG or WebP files",
            "replace or remove them",
        )
