"""Test images in batches, one thread for each batch.

Attacks on different images have nothing to do with each other, so whole batches are what threads
are given: inside one operation on small images they would mostly wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from training.data.splits import Split
from training.parallel.threads import side_by_side

Result = TypeVar("Result")
# What a core works on at once: larger is faster until its cache is full.
LARGEST = {"cpu": 64}
LARGEST_ELSEWHERE = 512


def in_batches(work: Callable[[Split, int], Result], split: Split) -> list[Result]:
    """Return `work(batch, start)` of every batch of the images, in their order.

    What comes out depends neither on how many threads there are nor on which is first.

    Args:
        work: takes a batch and the position of its first image, which names its random draws.
        split: images and labels.
    """
    count, device = len(split), split.images.device
    size = batch_size(count, LARGEST.get(device.type, LARGEST_ELSEWHERE))

    def at(start: int) -> Result:
        return work(split.take(slice(start, start + size)), start)

    return side_by_side(at, range(0, count, size), device)


def batch_size(count: int, largest: int) -> int:
    """Return the size that makes batches of `count` images few, alike and, unless one, even.

    Two cores then end together. The machine has no say: random draws and rounding belong to a
    batch.
    """
    batches = max(1, -(-count // largest))
    if batches > 1:
        batches += batches % 2
    return max(1, -(-count // batches))
