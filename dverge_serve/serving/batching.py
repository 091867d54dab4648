"""Micro-batching: requests that come while the engine is busy run together next."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import numpy.typing as npt

from dverge_serve.serving.responses import ServiceError

Images = npt.NDArray[Any]
R = TypeVar("R")


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
    forms the next batch. A job is never split; one larger than `max_batch` runs alone.

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
        # Two counters with one writer each (the loop, the thread) need no lock.
        self._submitted = 0
        self._taken = 0
        self._thread = threading.Thread(target=self._work, name="dverge-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait for the engine."""
        return self._submitted - self._taken

    def submit(self, images: Images) -> asyncio.Future[Part[R]]:
        """Queue `images` and return the future of their results; cancelling it leaves the batch.

        Raises:
            ServiceError: the queue is full.
        """
        count = len(images)
        waiting = self.waiting
        # A job larger than the whole queue may still run when nothing else waits.
        if waiting and waiting + count > self._max_queue:
            raise ServiceError("queue_full", "too many images are waiting; retry later")
        future: asyncio.Future[Part[R]] = self._loop.create_future()
        self._submitted += count
        self._inbox.put(_Job(images, future))
        return future

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
            if batch:
                outcomes = self._results(batch)
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
        try:
            result = self._run([job.images for job in batch])
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
