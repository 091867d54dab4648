from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from dverge_serve.serving import batching as batching_module
from dverge_serve.serving.batching import INLINE_S, NICE, Batcher, Images
from dverge_serve.serving.responses import ServiceError

pytestmark = pytest.mark.anyio


class Engine:
    """Adds up each image; holds every batch until told to go on."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.alone: list[bool] = []
        self.started = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def run(self, parts: Sequence[Images], alone: bool) -> list[float]:
        self.batches.append([len(part) for part in parts])
        self.alone.append(alone)
        self.started.release()
        assert self.go_on.acquire(timeout=30)
        if any((part < 0).any() for part in parts):
            raise ValueError("negative")
        return [float(image.sum()) for part in parts for image in part]

    async def wait_for_batch(self) -> None:
        assert await asyncio.to_thread(self.started.acquire, timeout=30)


def images(*values: float) -> Images:
    return np.array(values)[:, None]


@asynccontextmanager
async def batching(
    engine: Engine | QuickEngine, max_batch: int = 8, max_queue: int = 100, threads: int = 1
) -> AsyncIterator[Batcher[list[float]]]:
    loop = asyncio.get_running_loop()
    limits = {"threads": threads, "max_batch": max_batch, "max_queue": max_queue}
    batcher = Batcher(engine.run, loop, **limits, yields=threads > 1)
    try:
        yield batcher
    finally:
        batcher.close()
        if isinstance(engine, Engine):
            engine.go_on.release(1000)


async def test_an_idle_engine_takes_a_job_at_once_and_the_rest_run_together() -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        jobs = [batcher.submit(images(1))]
        await engine.wait_for_batch()
        jobs += [batcher.submit(images(2, 3)), batcher.submit(images(4))]
        assert batcher.waiting == 3
        engine.go_on.release(2)
        parts = await asyncio.gather(*jobs)
    assert engine.batches == [[1], [2, 1]]
    assert [part.result[part.start : part.stop] for part in parts] == [[1.0], [2.0, 3.0], [4.0]]


async def test_threads_take_fair_shares_and_know_whether_they_are_alone() -> None:
    engine = Engine()
    async with batching(engine, threads=2) as batcher:
        jobs = [batcher.submit(images(1))]
        await engine.wait_for_batch()
        jobs += [batcher.submit(images(2))]
        await engine.wait_for_batch()
        jobs += [batcher.submit(images(value)) for value in range(6)]
        engine.go_on.release()  # one of the two goes on, with half of the seven there are then
        await engine.wait_for_batch()
        assert batcher.waiting == 2
        engine.go_on.release(10)
        await asyncio.gather(*jobs)
        assert (await batcher.submit(images(3, 4))).result == [3.0, 4.0]
    assert engine.batches[:3] == [[1], [1], [1] * 4]
    assert engine.batches[-1] == [2]
    assert engine.alone[:3] == [True, False, False]
    assert engine.alone[-1]


async def test_a_job_too_large_for_a_batch_is_first_in_the_next_one() -> None:
    engine = Engine()
    async with batching(engine, threads=2, max_batch=4) as batcher:
        jobs = [batcher.submit(images(0)) for _ in range(2)]
        await engine.wait_for_batch()
        await engine.wait_for_batch()
        jobs += [batcher.submit(images(*range(size))) for size in (3, 4, 1)]
        for _ in range(3):
            engine.go_on.release()
            await engine.wait_for_batch()
        engine.go_on.release(2)
        await asyncio.gather(*jobs)
        batcher.close()
    assert engine.batches == [[1], [1], [3], [4], [1]]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux alone")
async def test_only_threads_that_yield_have_a_lower_priority() -> None:
    def niceness(parts: Sequence[Images], alone: bool) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    found = []
    for yields in (False, True):
        loop = asyncio.get_running_loop()
        batcher = Batcher(niceness, loop, threads=1, max_batch=1, max_queue=1, yields=yields)
        found.append((await batcher.submit(images(1))).result - os.getpriority(os.PRIO_PROCESS, 0))
        batcher.close()
    assert found == [0, min(NICE, 19 - os.getpriority(os.PRIO_PROCESS, 0))]


async def test_batches_are_bounded_and_a_job_is_never_split() -> None:
    engine = Engine()
    async with batching(engine, max_batch=4) as batcher:
        jobs = [batcher.submit(images(0))]
        await engine.wait_for_batch()
        sizes = [3, 2, 9, 1, 1]
        jobs += [batcher.submit(images(*range(size))) for size in sizes]
        engine.go_on.release(10)
        await asyncio.gather(*jobs)
    assert engine.batches == [[1], [3], [2], [9], [1, 1]]


async def test_a_full_queue_refuses_and_recovers() -> None:
    engine = Engine()
    async with batching(engine, max_queue=3) as batcher:
        jobs = [batcher.submit(images(0))]
        await engine.wait_for_batch()
        jobs += [batcher.submit(images(1, 2, 3))]
        with pytest.raises(ServiceError) as refusal:
            batcher.submit(images(4))
        assert refusal.value.code == "queue_full"
        assert (b"retry-after", b"1") in refusal.value.headers
        engine.go_on.release(3)
        await asyncio.gather(*jobs)
        part = await batcher.submit(images(5))
    assert part.result == [5.0]


async def test_a_cancelled_job_leaves_its_batch() -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        first = batcher.submit(images(0))
        await engine.wait_for_batch()
        gone, kept = batcher.submit(images(1)), batcher.submit(images(2))
        gone.cancel()
        engine.go_on.release(2)
        part = await kept
        await first
    assert engine.batches == [[1], [1]]
    assert part.result == [2.0]


async def test_a_job_cancelled_while_it_runs_harms_nobody() -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        running = batcher.submit(images(0))
        await engine.wait_for_batch()
        running.cancel()
        engine.go_on.release(2)
        part = await batcher.submit(images(7))
    assert part.result == [7.0]


async def test_a_job_that_fails_does_not_take_its_neighbours_along() -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        first = batcher.submit(images(0))
        await engine.wait_for_batch()
        bad, good = batcher.submit(images(-1)), batcher.submit(images(3))
        engine.go_on.release(10)
        await first
        part = await good
        with pytest.raises(ValueError, match="negative"):
            await bad
    assert part.result[part.start : part.stop] == [3.0]
    assert engine.batches == [[1], [1, 1], [1], [1]]


async def test_what_was_queued_before_closing_still_runs() -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        job = batcher.submit(images(1))
        await engine.wait_for_batch()
        queued = batcher.submit(images(2))
        batcher.close()
        engine.go_on.release(2)
        assert (await job).result == [1.0]
        assert (await queued).result == [2.0]


class QuickEngine:
    """Notes which thread ran each batch; takes `seconds` for it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[tuple[int, bool]] = []
        self.seconds = seconds

    def run(self, parts: Sequence[Images], alone: bool) -> list[float]:
        here = threading.current_thread() is threading.main_thread()
        self.batches.append((sum(map(len, parts)), here))
        time.sleep(self.seconds)
        if any((part < 0).any() for part in parts):
            raise ValueError("negative")
        return [float(image.sum()) for part in parts for image in part]


@pytest.fixture
def all_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    monkeypatch.setattr(batching_module, "INLINE_S", 60.0)


async def test_a_quick_engine_runs_a_single_image_in_the_event_loop_while_it_is_alone(
    all_is_quick: None,
) -> None:
    engine = QuickEngine()
    async with batching(engine) as batcher:
        for _ in range(2):  # the first one shows how quick it is
            assert (await batcher.submit(images(1))).result == [1.0]
        jobs = [batcher.submit(images(value)) for value in (2, 3)]
        parts = await asyncio.gather(*jobs)
        assert [part.result[part.start] for part in parts] == [2.0, 3.0]
        assert (await batcher.submit(images(4, 5))).result == [4.0, 5.0]
        assert (await batcher.submit(images(6))).result == [6.0]
    assert engine.batches[:2] == [(1, False), (1, True)]
    assert not any(here for _, here in engine.batches[2:-1])
    assert sum(count for count, _ in engine.batches[2:-1]) == 4
    assert engine.batches[-1] == (1, True)


async def test_a_slow_engine_never_runs_in_the_event_loop() -> None:
    engine = QuickEngine(seconds=2 * INLINE_S)
    async with batching(engine) as batcher:
        for _ in range(3):
            await batcher.submit(images(1))
    assert engine.batches == [(1, False)] * 3


async def test_in_the_event_loop_failures_are_told_and_cancelled_jobs_left_out(
    all_is_quick: None,
) -> None:
    engine = QuickEngine()
    async with batching(engine) as batcher:
        await batcher.submit(images(1))
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit(images(-1))
        batcher.submit(images(2)).cancel()
        await asyncio.sleep(0)
        await batcher.submit(images(3))
        assert batcher.waiting == 0
    assert engine.batches == [(1, False), (1, True), (1, True)]


async def test_nothing_runs_in_the_event_loop_while_the_thread_is_stuck(all_is_quick: None) -> None:
    engine = Engine()
    async with batching(engine) as batcher:
        engine.go_on.release()
        await batcher.submit(images(1))
        await engine.wait_for_batch()
        stuck = [batcher.submit(images(2)), batcher.submit(images(3))]
        await engine.wait_for_batch()
        for job in stuck:
            job.cancel()  # their callers give up; the engine has not
        late = batcher.submit(images(4))
        await asyncio.sleep(0.01)
        assert not late.done()
        engine.go_on.release(10)
        assert (await late).result[-1] == 4.0
