"""Near duplicates: images of one set that are images of another, or nearly so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.splits import Split, TrainingData
from training.data.streaming import Streamed

SIDE = 16  # pixels of the thumbnails that are compared
# Correlations from which two images count as one picture: of the grey thumbnails, then of all
# pixels. Other scans of a digit reach 0.989, the same image saved again as JPEG (75) 0.993.
NEAR, SAME_PIXELS = 0.99, 0.9
BLOCK = 512  # images compared at once
MOST = 0.01  # of the held-out images, before a user is warned
Images = Split | Streamed


@dataclass(frozen=True)
class Pictures:
    """Images as they are compared.

    Args:
        parts: the `N` images.
        hashes: of each image's pixels.
        thumbnails: grey, `[N, d]`, mean zero and length one; of one colour: zero.
        labels: classes.
    """

    parts: Sequence[Images]
    hashes: list[bytes]
    thumbnails: Tensor
    labels: list[int]

    @classmethod
    def of(cls, *parts: Images) -> Pictures:
        """Read the images of all parts."""
        hashes: list[bytes] = []
        labels: list[int] = []
        thumbnails = []
        for part in parts:
            for images, classes in part.fetch(torch.split(torch.arange(len(part)), BLOCK)):
                pixels = np.ascontiguousarray(images.cpu().numpy())
                hashes += [
                    hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in pixels
                ]
                labels += classes.tolist()
                thumbnails.append(_thumbnails(images).cpu())
        return cls(parts, hashes, torch.cat(thumbnails), labels)

    def images(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the images of some rows, uint8 `[n, C, H, W]`."""
        found: dict[int, Tensor] = {}
        first = 0
        for part in self.parts:
            here = np.flatnonzero((rows >= first) & (rows < first + len(part)))
            if len(here):
                ((images, _),) = part.fetch([torch.from_numpy(rows[here] - first)])
                found |= dict(zip(here.tolist(), images.cpu(), strict=True))
            first += len(part)
        return torch.stack([found[at] for at in range(len(rows))])


def find_copies(of: Pictures, among: Pictures) -> dict[int, tuple[int, str]]:
    """Return which images show the same picture as an image of another set.

    Returns:
        from the row of each to the other's row, and `exact`: equal in every pixel, or `near`: one
        is the other scaled, saved again, or with another brightness or contrast.
    """
    best = [(part @ among.thumbnails.T).max(1) for part in torch.split(of.thumbnails, BLOCK)]
    closest = torch.cat([each.indices for each in best]).numpy()
    near = np.flatnonzero(torch.cat([each.values for each in best]).numpy() >= NEAR)
    if len(near):
        pairs = _standardised(of.images(near)) * _standardised(among.images(closest[near]))
        near = near[pairs.sum(1).numpy() >= SAME_PIXELS]
    found = {int(row): (int(closest[row]), "near") for row in near}
    known: dict[bytes, int] = {}
    for row, name in enumerate(among.hashes):
        known.setdefault(name, row)
    return found | {
        row: (known[name], "exact") for row, name in enumerate(of.hashes) if name in known
    }


def crossing(data: TrainingData) -> list[str]:
    """Return a warning where held-out images nearly equal training images, else nothing.

    Images that stay on disk are not looked through for it.
    """
    if isinstance(data.train, Streamed):
        return []
    found = find_copies(Pictures.of(data.holdout), Pictures.of(data.train))
    if len(found) <= MOST * len(data.holdout):
        return []
    return [
        f"warning: {len(found):,} of {len(data.holdout):,} held-out images nearly equal a training "
        "image, so held-out accuracy is too good; hold out whole groups (data.group)"
    ]


def _thumbnails(images: Tensor) -> Tensor:
    grey = images.float().mean(1, keepdim=True)
    height, width = (min(SIDE, side) for side in grey.shape[2:])
    return _standardised(F.adaptive_avg_pool2d(grey, (height, width)))


def _standardised(images: Tensor) -> Tensor:
    flat = images.float().flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    # An image of one colour has no picture to compare.
    return F.normalize(flat, dim=1, eps=1e-3)
