"""Leakage: test images that are training images, or nearly so, and images with two classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dverge_serve.engine.report import Gate
from training.data.near_duplicates import NEAR, SAME_PIXELS, Images, Pictures, find_copies
from training.data.splits import Split
from verification.attacks.cache import Arrays, cached

MOST = 0.01  # of the test images
NAMED = 100  # pairs listed at most
KINDS = ("exact", "near")


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
    ours, theirs = Pictures.of(test.to(torch.device("cpu"))), Pictures.of(*training)
    classes = defaultdict(set)
    for each in (ours, theirs):
        for name, label in zip(each.hashes, each.labels, strict=True):
            classes[name].add(label)
    pairs = tuple(
        Pair(row, other, kind, ours.labels[row], theirs.labels[other])
        for row, (other, kind) in sorted(find_copies(ours, theirs).items())
    )
    return Leakage(
        len(test),
        len(theirs.labels),
        pairs,
        sum(len(each) > 1 for each in classes.values()),
        frozenset(pair.test for pair in pairs if pair.test_class != pair.train_class)
        | {row for row, name in enumerate(ours.hashes) if len(classes[name]) > 1},
    )
