"""Micro-batching: requests that come while all cores are busy run together next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
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
# thread, and the loop after it, takes time of its own. What comes meanwhile would wait anyway.
INLINE_S = 0.005
NICE = 5  # of threads that yield to the event loop: on a full machine it stays quick to refuse


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
    """Feeds one engine from threads of its own, one for each batch that should run at a time.

    There is no waiting window: an idle thread takes a job at once, and what arrives while all work
    forms the next batches. A job is never split; one larger than `max_batch` runs alone. A single
    image that nothing else is there beside runs in the event loop, if that is quick.

    Args:
        run: called with the jobs' arrays `[n, ...]`, and whether no other batch runs; its result
            describes their rows in order.
        loop: the event loop that jobs come from and go back to.
        threads: most batches at a time.
        max_batch: most images in one batch of several jobs.
        max_queue: most images waiting; a job that would exceed it is refused.
        yields: the threads compute on cores that the loop needs, too, and let it go first.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Images], bool], R],
        loop: asyncio.AbstractEventLoop,
        *,
        threads: int,
        max_batch: int,
        max_queue: int,
        yields: bool = False,
    ) -> None:
        self._run, self._loop = run, loop
        self._yields = yields
        self._max_batch, self._max_queue = max_batch, max_queue
        self._inbox: SimpleQueue[_Job[R] | None] = SimpleQueue()
        self._turn = threading.Lock()  # held by the thread that waits for jobs and takes them
        self._next: _Job[R] | None = None  # what did not fit into the last batch
        # Counters with one writer each (the loop, who has the turn, a thread) need no other lock.
        self._submitted = 0
        self._taken = 0
        # Images that each thread has in hand, whether or not callers still wait for them.
        self._running = [0] * threads
        self._single_s = INLINE_S + 1  # time of the last batch of one image
        self._alone: _Job[R] | None = None
        for number in range(threads):
            name = f"dverge-engine-{number}"
            threading.Thread(target=self._work, args=(number,), name=name, daemon=True).start()

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
        idle = self._alone is None and not self.waiting and not any(self._running)
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
            _deliver([job], self._results([job], alone=True))

    def close(self) -> None:
        """Let the threads finish what is queued, then end; returns at once."""
        self._inbox.put(None)

    def _work(self, number: int) -> None:
        if self._yields and sys.platform == "linux":  # elsewhere this is the whole process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        closed = False
        while not closed:
            with self._turn:
                batch, closed = self._gather(number)
            if batch:
                others = self.waiting or len(self._running) - self._running.count(0) > 1
                outcomes = self._results(batch, alone=not others)
                self._running[number] = 0
                # The loop is closed only when the process is going down.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_deliver, batch, outcomes)
            self._running[number] = 0
        self._inbox.put(None)  # for the next thread

    def _gather(self, number: int) -> tuple[list[_Job[R]], bool]:
        """Wait for a job; return it with those that fit, and whether the inbox was closed."""
        batch: list[_Job[R]] = []
        size = limit = 0
        job, self._next = self._next or self._inbox.get(), None
        while job is not None:
            count = len(job.images)
            if batch and size + count > limit:
                self._next = job
                return batch, False
            self._running[number] += count  # before it no longer counts as waiting
            self._taken += count
            if not job.future.cancelled():
                batch.append(job)
                size += count
            # Its share of all there is: a larger batch would keep its first callers waiting.
            share = -(-(self.waiting + sum(self._running)) // len(self._running))
            limit = min(self._max_batch, share)
            try:
                job = self._inbox.get_nowait()
            except Empty:
                return batch, False
        return batch, True

    def _results(self, batch: list[_Job[R]], alone: bool) -> list[Part[R] | Exception]:
        begun = time.perf_counter()
        try:
            result = self._run([job.images for job in batch], alone)
            if alone and len(batch) == len(batch[0].images) == 1:
                self._single_s = time.perf_counter() - begun
        except Exception as error:
            # One job must not take the others with it: each gets a run of its own.
            if len(batch) == 1:
                return [error]
            return [self._results([job], alone)[0] for job in batch]
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
