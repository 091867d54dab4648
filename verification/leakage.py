"""Leakage: test images that are training images, or nearly so, and images with two classes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dverge_serve.engine.report import Gate
from training.data.splits import Split
from training.data.streaming import Streamed
from verification.attacks.cache import Arrays, cached

SIDE = 16  # pixels of the thumbnails that are compared
# Correlations from which two images count as one picture: of the grey thumbnails, then of all
# pixels. Other scans of a digit reach 0.989, the same image saved again as JPEG (75) 0.993.
NEAR, SAME_PIXELS = 0.99, 0.9
MOST = 0.01  # of the test images
NAMED = 100  # pairs listed at most
BLOCK = 512  # test images compared at once
KINDS = ("exact", "near")
Images = Split | Streamed


@dataclass(frozen=True)
class Pair:
    """A test image and a training image that show the same picture.

    Args:
        test, train: the images' positions; training images come before the held-out ones.
        kind: `exact`: equal in every pixel; `near`: one is the other scaled, saved again, or with
            another brightness or contrast.
        test_class, train_class: indices of their classes.
    """

    test: int
    train: int
    kind: str
    test_class: int
    train_class: int


@dataclass(frozen=True)
class Leakage:
    """What of the test images was seen in training.

    Args:
        test_images, training_images: how many were compared.
        pairs: one for each test image that is also a training image.
        two_classes: pictures, equal in every pixel, that have more than one class.
        contradicted: test images one of whose copies has another class.
    """

    test_images: int
    training_images: int
    pairs: tuple[Pair, ...]
    two_classes: int
    contradicted: frozenset[int]

    def count(self, kind: str) -> int:
        """Return how many test images have a training image of this kind."""
        return sum(pair.kind == kind for pair in self.pairs)

    def to_arrays(self) -> Arrays:
        """Return the form kept in the cache."""
        rows = [
            (pair.test, pair.train, KINDS.index(pair.kind), pair.test_class, pair.train_class)
            for pair in self.pairs
        ]
        return {
            "counts": np.array([self.test_images, self.training_images, self.two_classes]),
            "pairs": np.array(rows, dtype=np.int64).reshape(-1, 5),
            "contradicted": np.array(sorted(self.contradicted), dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Leakage:
        """Read `to_arrays`'s form back."""
        test, training, two = arrays["counts"].tolist()
        rows = arrays["pairs"].tolist()
        pairs = tuple(Pair(a, b, KINDS[kind], one, other) for a, b, kind, one, other in rows)
        return cls(test, training, pairs, two, frozenset(arrays["contradicted"].tolist()))

    def to_json(self, test: Sequence[str], train: Sequence[str]) -> dict[str, Any]:
        """Return its entry in the report.

        Args:
            test, train: the images' files, by position; none where they are no files.
        """

        return {
            "test_images": self.test_images,
            "training_images": self.training_images,
            "exact": self.count("exact"),
            "near": self.count("near"),
            "two_classes": self.two_classes,
            "pairs": [
                asdict(pair)
                | {"test": test[pair.test] if test else f"test image {pair.test}"}
                | {"train": train[pair.train] if train else f"training image {pair.train}"}
                for pair in self.pairs[:NAMED]
            ],
        }


def no_leakage(found: Leakage, known: bool) -> Gate:
    """At most one test image in a hundred was seen in training, or has a copy of another class.

    Args:
        found: the leakage.
        known: whether the training images are those the model was trained on.
    """
    seen = {pair.test for pair in found.pairs} | found.contradicted
    detail = (
        f"of {found.test_images} test images {found.count('exact')} are training images"
        f"{'' if known else ' of the data given'} and {found.count('near')} nearly; "
        f"{found.two_classes} pictures have two classes (allowed {MOST:.0%} of the test images)"
    )
    return Gate("no-leakage", len(seen) <= MOST * found.test_images, "INCONCLUSIVE", detail)


def known_leakage(training: Sequence[Images], test: Split) -> Leakage:
    """Return `find_leakage` of these images, from the cache if they were compared before."""
    key = ["leakage", NEAR, SAME_PIXELS, *(part.sha256 for part in training), test.sha256]
    return Leakage.from_arrays(cached(key, lambda: find_leakage(training, test).to_arrays()))


def find_leakage(training: Sequence[Images], test: Split) -> Leakage:
    """Look for test images among the training images.

    Args:
        training: the training images and the held-out ones.
        test: the test images.
    """
    test = test.to(torch.device("cpu"))
    hashes, thumbnails, labels = _training(training)
    known: dict[bytes, int] = {}
    classes = defaultdict(set)
    for row, (name, label) in enumerate(zip(hashes, labels, strict=True)):
        known.setdefault(name, row)
        classes[name].add(label)
    test_labels: list[int] = test.labels.tolist()
    test_hashes = _hashes(test.images)
    for name, label in zip(test_hashes, test_labels, strict=True):
        classes[name].add(label)
    closest, alike = _closest(_thumbnails(test.images), thumbnails)
    near = np.flatnonzero(alike >= NEAR)
    near = near[_correlations(test, near, training, closest[near]) >= SAME_PIXELS]
    found = {int(row): (int(closest[row]), "near") for row in near}
    found |= {row: (known[name], "exact") for row, name in enumerate(test_hashes) if name in known}
    pairs = tuple(
        Pair(row, other, kind, test_labels[row], labels[other])
        for row, (other, kind) in sorted(found.items())
    )
    return Leakage(
        len(test),
        len(labels),
        pairs,
        sum(len(each) > 1 for each in classes.values()),
        frozenset(pair.test for pair in pairs if pair.test_class != pair.train_class)
        | {row for row, name in enumerate(test_hashes) if len(classes[name]) > 1},
    )


def _training(parts: Sequence[Images]) -> tuple[list[bytes], Tensor, list[int]]:
    hashes: list[bytes] = []
    labels: list[int] = []
    thumbnails = []
    for part in parts:
        for images, classes in part.fetch(torch.split(torch.arange(len(part)), BLOCK)):
            hashes += _hashes(images)
            labels += classes.tolist()
            thumbnails.append(_thumbnails(images))
    return hashes, torch.cat(thumbnails), labels


def _hashes(images: Tensor) -> list[bytes]:
    pixels = np.ascontiguousarray(images.cpu().numpy())
    return [hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in pixels]


def _thumbnails(images: Tensor) -> Tensor:
    """Return grey thumbnails `[N, d]`, mean zero and length one; of one colour: zero."""
    parts = []
    for part in torch.split(images, BLOCK):
        grey = part.float().mean(1, keepdim=True)
        height, width = (min(SIDE, side) for side in grey.shape[2:])
        parts.append(_standardised(F.adaptive_avg_pool2d(grey, (height, width))))
    return torch.cat(parts)


def _standardised(images: Tensor) -> Tensor:
    flat = images.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    # An image of one colour has no picture to compare.
    return F.normalize(flat, dim=1, eps=1e-3)


def _closest(
    test: Tensor, training: Tensor
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return for each test image the training image that correlates most, and how much."""
    best = [(part @ training.T).max(1) for part in torch.split(test, BLOCK)]
    rows, values = torch.cat([each.indices for each in best]), torch.cat([v.values for v in best])
    return rows.cpu().numpy(), values.cpu().numpy()


def _correlations(
    test: Split,
    rows: npt.NDArray[np.int64],
    training: Sequence[Images],
    others: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Return the correlation of all pixels, for pairs of a test and a training image."""
    if not len(rows):
        return np.zeros(0, np.float32)
    images = torch.empty((len(rows), *test.images.shape[1:]), dtype=torch.uint8)
    first = 0
    for part in training:
        here = np.flatnonzero((others >= first) & (others < first + len(part)))
        if len(here):
            wanted = torch.from_numpy(others[here] - first)
            ((found, _),) = part.fetch([wanted])
            images[torch.from_numpy(here)] = found.cpu()
        first += len(part)
    ours = test.images[torch.from_numpy(rows)]
    pairs = _standardised(ours.float()) * _standardised(images.float())
    return np.asarray(pairs.sum(1).numpy())
