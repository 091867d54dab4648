"""Test images in batches, one thread for each batch.

Images are attacked independently of one another, so each thread is given whole batches: inside one
operation on small images threads would mostly wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from training.data.splits import Split
from training.parallel.threads import one_thread_inside, side_by_side
from verification.config import LARGE

Result = TypeVar("Result")
# What a core works on at once: larger is faster until its cache is full.
LARGEST = {"cpu": 64}
LARGEST_ELSEWHERE = 512


def in_batches(work: Callable[[Split, int], Result], split: Split) -> list[Result]:
    """Return `work(batch, start)` of every batch of the images, in their order.

    Args:
        work: takes a batch and the position of its first image, which names its random draws.
        split: images and labels.
    """

    def one(part: slice) -> Result:
        return work(split.take(part), part.start)

    return in_slices(one, len(split), split.images)


def in_slices(work: Callable[[slice], Result], count: int, like: Tensor) -> list[Result]:
    """Return `work(part)` of every batch of `count` images, in their order.

    The result depends neither on the number of threads nor on their timing. A single batch of small
    images has one thread: a second one saves it little time, and where other processes use the
    cores, it burns many times its work in waiting.

    Args:
        work: takes the positions of a batch; `part.start` names its random draws.
        count: how many images there are.
        like: images `[n, C, H, W]` of their size, where they are.
    """
    size = batch_size(count, LARGEST.get(like.device.type, LARGEST_ELSEWHERE))
    parts = [slice(start, start + size) for start in range(0, count, size)]
    if len(parts) == 1 and like.device.type == "cpu" and like.shape[2] * like.shape[3] <= LARGE:
        with one_thread_inside():
            return [work(parts[0])]
    return side_by_side(work, parts, like.device)


def spread(split: Split, *most: int) -> Tensor:
    """Return the positions of as many images as the smallest limit allows, evenly spaced, int64.

    Args:
        split: the images.
        most: limits; 0 is none.
    """
    count = min([each for each in most if each], default=len(split))
    rows = np.unique(np.linspace(0, len(split) - 1, count).round().astype(np.int64))
    return torch.from_numpy(rows).to(split.device)


def batch_size(count: int, largest: int) -> int:
    """Return the size of few, alike batches of `count` images, an even number of them unless one.

    Two cores then end together. The size does not depend on the machine, because random draws and
    rounding depend on the batch.
    """
    batches = max(1, -(-count // largest))
    if batches > 1:
        batches += batches % 2
    return max(1, -(-count // batches))
