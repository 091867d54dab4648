"""Tasks that overlap: each starts as soon as what it uses is free, on one thread for each core.

Where there are more members than cores, steps that all members make together leave cores idle at
the end of each. Members that are done with a step can begin the next one meanwhile.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

from training.parallel.threads import thread_pool

Result = TypeVar("Result")


class Tasks:
    """A queue of tasks, of which those that use nothing in common run side by side.

    Tasks that use the same thing run one after the other, in the order in which they were added.
    So each finds what it would find if all ran in that order, and computes the same, whatever the
    number of threads and their timing. Of those that can run, the one that was added first does.

    After the first error no further task runs. Leaving the context waits for those that run.

    Args:
        threads: how many tasks run at once, each with one thread inside its operations.
    """

    def __init__(self, threads: int) -> None:
        self._pool, self._lock = thread_pool(threads, 1), Lock()
        self._ready: list[_Task] = []
        self._last: dict[Hashable, Future[Any]] = {}  # of the tasks that use each thing
        self._added = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Tasks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._error = self._error or error
        wait(self._last.values())

    def add(
        self,
        work: Callable[..., Result],
        *,
        uses: Iterable[Hashable],
        needs: Sequence[Future[Any]] = (),
    ) -> Future[Result]:
        """Queue `work(*results of needs)` and return its future result.

        Args:
            work: runs in another thread; grad mode and autocast are a thread's own.
            uses: names of what it reads or changes and other tasks change.
            needs: earlier tasks whose results it takes.
        """
        uses, found = list(uses), Future[Result]()
        task = _Task(self._added, work, needs, found)
        before = {*needs, *(self._last[each] for each in uses if each in self._last)}
        self._added += 1
        self._last.update(dict.fromkeys(uses, found))
        task.waiting = len(before) + 1
        for each in before:
            each.add_done_callback(lambda _: self._one_less(task))
        self._one_less(task)
        return found

    def _one_less(self, task: _Task) -> None:
        with self._lock:
            task.waiting -= 1
            if task.waiting:
                return
            heapq.heappush(self._ready, task)
        self._pool.submit(self._run_first)

    def _run_first(self) -> None:
        with self._lock:
            task = heapq.heappop(self._ready)
        if self._error is not None:
            task.found.set_exception(self._error)
            return
        try:
            result = task.work(*(each.result() for each in task.needs))
        except BaseException as error:
            self._error = self._error or error
            task.found.set_exception(error)
        else:
            task.found.set_result(result)


@dataclass(order=True)
class _Task:
    number: int
    work: Callable[..., Any] = field(compare=False)
    needs: Sequence[Future[Any]] = field(compare=False)
    found: Future[Any] = field(compare=False)
    waiting: int = field(default=0, compare=False)  # for so many tasks, and to be added
