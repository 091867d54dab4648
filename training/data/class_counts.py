"""Class counts, and warnings about imbalanced classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.data.splits import TrainingData

IMBALANCED = 3.0  # times as many images in the largest class as in the smallest
SHOWN = 12  # classes that one line holds


def class_counts(data: TrainingData) -> dict[str, int]:
    """Return how many images of the training part each class has."""
    return _counted(data.labels, data.train.labels)


def balance(data: TrainingData) -> list[str]:
    """Return a line of class counts, then the warnings, if any."""
    counts = class_counts(data)
    (rare, fewest), (common, most) = (
        pick(counts.items(), key=lambda item: item[1]) for pick in (min, max)
    )
    ratio = most / fewest
    lines = [
        f"{len(data.train):,} training images of {len(counts)} classes, the largest {ratio:.1f} "
        f"times the smallest: {_listed(counts)}"
    ]
    if ratio > IMBALANCED:
        lines.append(
            f"warning: imbalanced classes, '{common}' {most:,} to '{rare}' {fewest:,}; members "
            "learn little of the rare ones, and accuracy hides it"
        )
    if data.groups is not None:
        train, out = data.groups
        lines.append(f"held out: {out:,} of {train + out:,} groups, {len(data.holdout):,} images")
    held = _counted(data.labels, data.holdout.labels)
    if absent := [name for name, count in held.items() if not count]:
        lines.append(
            f"warning: no held-out image of '{absent[0]}' ({len(absent)} such classes), of which "
            "held-out accuracy says nothing; raise data.holdout or add images"
        )
    return lines


def _counted(labels: tuple[str, ...], targets: Tensor) -> dict[str, int]:
    counts = torch.bincount(targets.cpu(), minlength=len(labels)).tolist()
    return dict(zip(labels, counts, strict=True))


def _listed(counts: Mapping[str, int]) -> str:
    """Return the counts from the largest to the smallest; of many classes, both ends."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    words = [f"{name}: {count:,}" for name, count in ordered]
    if len(words) > SHOWN:
        words[SHOWN // 2 : -SHOWN // 2] = ["..."]
    return ", ".join(words)
