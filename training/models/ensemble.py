"""Ensembles: members whose mean logits are the answer, as one `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """An ensemble of classifiers that answers with the mean of their logits.

    A plain module from images in `[0,1]` to logits: each member normalises by itself, so attack
    libraries take it as it is, with bounds 0 and 1 and no preprocessing.

    Args:
        members: networks from float `[B, C, H, W]` to logits `[B, K]`; shared, not copied.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the members' logits, `[B, K]`, for images `[B, C, H, W]`."""
        return torch.stack([member(images) for member in self.members]).mean(0)

    def member_logits(self, images: Tensor) -> Tensor:
        """Return every member's logits, `[B, M, K]`, for images `[B, C, H, W]`."""
        return torch.stack([member(images) for member in self.members], 1)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.members)

    def __getitem__(self, index: int) -> nn.Module:
        return self.members[index]
