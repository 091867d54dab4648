"""Accuracy of an ensemble on labelled images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.data.splits import Split, to_float
from training.models.member import Member
from training.parallel.threads import side_by_side

EVALUATION_BATCH = 512


def accuracy(members: Sequence[Member], split: Split) -> float:
    """Return the share of `split` that the mean of the members' logits gets right."""
    if not len(split):
        return float("nan")
    right = 0
    for start in range(0, len(split), EVALUATION_BATCH):
        part = split.take(slice(start, start + EVALUATION_BATCH))
        images = to_float(part.images)

        @torch.no_grad()
        def logits(member: Member, images: Tensor = images) -> Tensor:
            return member.eval()(images)  # type: ignore[no-any-return]

        mean = torch.stack(side_by_side(logits, members, split.device)).mean(0)
        right += int((mean.argmax(1) == part.labels).sum())
    return right / len(split)
