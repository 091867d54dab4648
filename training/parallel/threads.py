"""Members in parallel: a thread each on the CPU's cores; on a GPU a stream each, or in turn.

Small networks give a thread pool inside each operation too little to do: its threads mostly wait
for one another, all the more on cores that other processes share. Members are independent between
exchanges of images, so they are the better unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from training.parallel.cuda_graphs import over_lanes

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> list[Result]:
    """Return `[work(item) for item in items]`, computed by as many threads as make sense.

    The result does not depend on timing: each item is computed by itself, in one thread, with a
    number of threads inside it that depends only on the machine and the number of items. Grad mode
    is a thread's own: `work` sets it if it needs another than the default.
    """
    items = list(items)
    cores = torch.get_num_threads()
    workers = min(len(items), cores)
    if device.type == "cuda":
        return over_lanes(work, items)
    if workers < 2:
        return [work(item) for item in items]
    return list(thread_pool(workers, max(1, cores // workers)).map(work, items))


@cache
def thread_pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of so many workers with so many threads inside each one's operations."""
    return ThreadPoolExecutor(workers, "member", initializer=_set_threads, initargs=(threads,))


@contextlib.contextmanager
def one_thread_inside() -> Iterator[None]:
    """Give this thread's operations one thread: more would cost more than they give.

    On small tensors, or while the workers of a pool use the cores, threads mostly wait.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _set_threads(threads: int) -> None:
    """Set how many threads this thread's operations have, for good."""
    torch.get_num_threads()  # a thread's first look would set it to what another thread set last
    torch.set_num_threads(threads)
