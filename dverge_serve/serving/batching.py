"""Micro-batching: requests that come while the engine is busy run together next."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import numpy.typing as npt

from dverge_serve.serving.responses import ServiceError

Images = npt.NDArray[Any]
R = TypeVar("R")

# An engine that takes no longer for one image runs in the event loop while it is alone: waking a
# thread, and the loop after it, takes about a tenth of this.
INLINE_S = 0.002


@dataclass(slots=True, frozen=True)
class Part(Generic[R]):
    """One job's share of a batch's result: rows `start` to `stop`."""

    result: R
    start: int
    stop: int


@dataclass(slots=True)
class _Job(Generic[R]):
    images: Images
    future: asyncio.Future[Part[R]]


class Batcher(Generic[R]):
    """Feeds one engine from one thread of its own.

    There is no waiting window: an idle engine takes a job at once, and what arrives while it works
    forms the next batch. A job is never split; one larger than `max_batch` runs alone. A single
    image that nothing else is there beside runs in the event loop, if that is quick.

    Args:
        run: called in the engine's thread with the jobs' arrays `[n, ...]`; its result describes
            their rows in order.
        loop: the event loop that jobs come from and go back to.
        max_batch: most images in one batch of several jobs.
        max_queue: most images waiting; a job that would exceed it is refused.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Images]], R],
        loop: asyncio.AbstractEventLoop,
        *,
        max_batch: int,
        max_queue: int,
    ) -> None:
        self._run, self._loop = run, loop
        self._max_batch, self._max_queue = max_batch, max_queue
        self._inbox: SimpleQueue[_Job[R] | None] = SimpleQueue()
        # Counters with one writer each (the loop, the thread) need no lock. The thread is idle
        # where it has finished all that was submitted, whether or not callers still wait for it.
        self._submitted = 0
        self._taken = 0
        self._finished = 0
        self._single_s = INLINE_S + 1  # time of the last batch of one image
        self._alone: _Job[R] | None = None
        self._thread = threading.Thread(target=self._work, name="dverge-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait for the engine."""
        return self._submitted - self._taken

    def check_room(self, count: int = 1) -> None:
        """Check that `count` more images may wait.

        Raises:
            ServiceError: the queue is full.
        """
        waiting = self.waiting
        # A job larger than the whole queue may still run when nothing else waits.
        if waiting and waiting + count > self._max_queue:
            raise ServiceError("queue_full", "too many images are waiting; retry later")

    def submit(self, images: Images) -> asyncio.Future[Part[R]]:
        """Queue `images` and return the future of their results; cancelling it leaves the batch.

        Raises:
            ServiceError: the queue is full.
        """
        count = len(images)
        self.check_room(count)
        future: asyncio.Future[Part[R]] = self._loop.create_future()
        job = _Job(images, future)
        idle = self._alone is None and self._finished == self._submitted
        if idle and count == 1 and self._single_s <= INLINE_S:
            self._alone = job
            self._loop.call_soon(self._run_alone)  # others may come in this very step
            return future
        for each in (self._alone, job):
            if each is not None:
                self._submitted += len(each.images)
                self._inbox.put(each)
        self._alone = None
        return future

    def _run_alone(self) -> None:
        job, self._alone = self._alone, None
        if job is not None and not job.future.cancelled():
            _deliver([job], self._results([job]))

    def close(self) -> None:
        """Let the thread finish what is queued, then end; returns at once."""
        self._inbox.put(None)

    def _work(self) -> None:
        first: _Job[R] | None = None
        while True:
            first = first or self._inbox.get()
            if first is None:
                return
            batch, first, last = self._gather(first)
            outcomes = self._results(batch) if batch else []
            self._finished = self._taken
            if batch:
                # The loop is closed only when the process is going down.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_deliver, batch, outcomes)
            if last:
                return

    def _gather(self, first: _Job[R]) -> tuple[list[_Job[R]], _Job[R] | None, bool]:
        """Return a batch, the job that no longer fitted, and whether the inbox was closed."""
        batch: list[_Job[R]] = []
        size = 0
        job: _Job[R] | None = first
        while job is not None:
            count = len(job.images)
            if batch and size + count > self._max_batch:
                return batch, job, False
            self._taken += count
            if not job.future.cancelled():
                batch.append(job)
                size += count
            try:
                job = self._inbox.get_nowait()
            except Empty:
                return batch, None, False
        return batch, None, True

    def _results(self, batch: list[_Job[R]]) -> list[Part[R] | Exception]:
        begun = time.perf_counter()
        try:
            result = self._run([job.images for job in batch])
            if len(batch) == len(batch[0].images) == 1:
                self._single_s = time.perf_counter() - begun
        except Exception as error:
            # One job must not take the others with it: each gets a run of its own.
            return [error] if len(batch) == 1 else [self._results([job])[0] for job in batch]
        parts: list[Part[R] | Exception] = []
        at = 0
        for job in batch:
            parts.append(Part(result, at, at + len(job.images)))
            at += len(job.images)
        return parts


def _deliver(batch: list[_Job[R]], outcomes: list[Part[R] | Exception]) -> None:
    for job, outcome in zip(batch, outcomes, strict=True):
        if job.future.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
