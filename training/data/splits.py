"""Images and labels: their fixed splits, and batches made on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.errors import UserError
from dverge_serve.progress import say
from training.config import Data
from training.data import sources
from training.data.augmentation import jitter
from training.data.holdout import parts
from training.data.streaming import Streamed, streamed, streams
from training.device import send
from training.seeds import generator


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

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    def to(self, device: torch.device) -> Split:
        """Return the split on `device`.

        Raises:
            UserError: they do not fit there.
        """
        try:
            return Split(self.images.to(device), self.labels.to(device))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(self)} images of shape {list(self.images.shape[1:])} do not fit on {device}",
                next_step="`overrides` data.memory_gb=0 reads a folder of images during training",
            ) from error

    def take(self, index: Tensor | slice) -> Split:
        """Return the chosen rows."""
        return Split(self.images[index], self.labels[index])

    def fetch(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `[n, C, H, W]` and labels `[n]` of each part; a part is CPU rows, `[n]`."""
        for part in parts:
            rows = send(part, self.device)
            yield self.images[rows], self.labels[rows]

    @property
    def levels(self) -> Tensor:
        """How often each of the 256 levels occurs in each channel, float64 `[C, 256]`."""
        counted = [
            torch.bincount(channel.flatten(), minlength=256)
            for channel in self.images.cpu().unbind(1)
        ]
        return torch.stack(counted).double()

    @property
    def sha256(self) -> str:
        """Hash of shape, pixels and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """Images for training and held-out images for choosing; the test set is not among them.

    Args:
        labels: names of the classes.
        train, holdout: the images.
        groups: how many groups of images each of the two has, where whole groups were held out.
    """

    labels: tuple[str, ...]
    train: Split | Streamed
    holdout: Split
    groups: tuple[int, int] | None = None


def load_training(data: Data) -> TrainingData:
    """Load the training images and set the held-out part aside, the same part for every seed.

    Where they are a folder of more images than memory is given for, they stay on disk.

    Raises:
        UserError: missing or empty folders, unreadable images, a failed download, too few images.
    """
    if data.name != "imagefolder":
        labels, (pixels, targets) = sources.read(data, "train")
        kept, out = parts(targets, labels, data)
        return TrainingData(
            labels, _split(pixels[kept], targets[kept]), _split(pixels[out], targets[out])
        )
    labels, files = sources.image_files(data, "train")
    for line in files.notes:
        say(line)
    kept, out = parts(files.targets, labels, data, files.groups)
    held = files.take(out)
    groups = None
    if files.groups:
        groups = len({*files.groups} - {*held.groups}), len({*held.groups})
    if streams(files, data):
        return TrainingData(labels, streamed(files.take(kept), data), _split(*held.read()), groups)
    # Read in an order that makes both parts views: no second copy of the images.
    pixels, targets = files.take(np.concatenate([kept, out])).read()
    count = len(kept)
    return TrainingData(
        labels,
        _split(pixels[:count], targets[:count]),
        _split(pixels[count:], targets[count:]),
        groups,
    )


def training_images(data: Data) -> int:
    """Return how many images `load_training` would train on; of a folder, none is decoded."""
    if data.name == "imagefolder":
        labels, files = sources.image_files(data, "train")
        return len(parts(files.targets, labels, data, files.groups)[0])
    return len(load_training(data).train)


def load_test(data: Data) -> tuple[tuple[str, ...], Split]:
    """Load the test images: class names and the split. Only verification calls this."""
    labels, (pixels, targets) = sources.read(data, "test")
    return labels, _split(pixels, targets)


def image_files(data: Data, part: str) -> list[str]:
    """Return the files of a folder's images, relative to it, in the order they are loaded in.

    Those of `train` are the training images, then the held-out ones. Other data has no files.
    """
    if data.name != "imagefolder":
        return []
    labels, files = sources.image_files(data, part)
    if part == "train":
        both = parts(files.targets, labels, data, files.groups)
        files = files.take(np.concatenate(both))
    root = Path(data.path)
    folder = root if root.is_dir() else root.parent  # of a CSV file
    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in files.paths]


def load_rest(data: Data) -> Split:
    """Load the test images that `data.test_limit` leaves out, some thousands at most."""
    _, (pixels, targets) = sources.read(data, "rest")
    return _split(pixels, targets)


def normalisation(data: Data, train: Split | Streamed) -> tuple[list[float], list[float]]:
    """Return the recipe's mean and deviation of each channel, else those of the training images."""
    if data.mean and data.std:
        return list(data.mean), list(data.std)
    # Counting levels is exact, whatever the thread count, and needs no wider copy of the images.
    levels = torch.arange(256, dtype=torch.float64)
    shares = train.levels / train.levels.sum(1, keepdim=True)
    mean = (shares * levels).sum(1)
    std = ((shares * levels**2).sum(1) - mean**2).clamp_min(1.0).sqrt()
    return [round(v / 255, 4) for v in mean.tolist()], [round(v / 255, 4) for v in std.tolist()]


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images as float32 in `[0,1]`, the same numbers the service computes.

    The divisor is a tensor: by a Python number, CUDA multiplies with the rounded reciprocal.
    """
    return batch.float() / torch.full((), 255.0, device=batch.device)


def batches(
    split: Split | Streamed, batch_size: int, data: Data, *seed_path: int | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one shuffled, augmented epoch: float32 images `[B,C,H,W]` in `[0,1]` and labels `[B]`.

    All is drawn on the CPU: what a GPU draws depends on its model.

    Args:
        split: the images, on or bound for the device where the batches are made.
        batch_size: images a batch; the last may be smaller, but never a single image, which
            BatchNorm cannot normalise.
        data: the augmentation.
        seed_path: what this epoch is, for the random generator (see `training.seeds`).
    """
    draw = generator(*seed_path)
    order = torch.randperm(len(split), generator=draw)
    rows = [part for part in torch.split(order, batch_size) if len(part) > 1]
    for images, labels in split.fetch(rows):
        yield jitter(to_float(augment(images, data, draw)), data.augment, draw), labels


def augment(batch: Tensor, data: Data, draw: torch.Generator) -> Tensor:
    """Return the batch `[B,C,H,W]` after random crop (zero padding) and horizontal flip.

    Args:
        batch: images, anywhere.
        data: the augmentation.
        draw: on the CPU.
    """
    count, _, height, width = batch.shape
    rows = torch.arange(height, device=batch.device).expand(count, -1)
    columns = torch.arange(width, device=batch.device).expand(count, -1)

    def random(high: int) -> Tensor:
        return send(torch.randint(high, (count, 1), generator=draw), batch.device)

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
