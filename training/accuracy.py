"""Accuracy of an ensemble on labelled images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.data.splits import Split, to_float
from training.models.ensemble import Ensemble
from training.models.member import Member

EVALUATION_BATCH = 512


def accuracy(members: Sequence[Member], split: Split) -> float:
    """Return the share of `split` that the mean of the members' logits gets right."""
    if not len(split):
        return float("nan")
    right = 0
    ensemble = Ensemble(members).eval()
    with torch.no_grad():
        for start in range(0, len(split), EVALUATION_BATCH):
            part = split.take(slice(start, start + EVALUATION_BATCH))
            logits = ensemble(to_float(part.images))
            right += int((logits.argmax(1) == part.labels).sum())
    return right / len(split)
