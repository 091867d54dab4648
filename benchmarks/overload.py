"""The service at twice its capacity: a part of `benchmarks.serving`.

`wrk` waits for answers before it asks again, so that it never offers more than a server can answer.
Here requests begin at a constant rate, whatever the answers do, and their times count from the
moment at which they were due. This generator takes a share of the same cores.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import Any, cast

import httptools
import numpy as np
import numpy.typing as npt
import uvloop

from benchmarks.bench import bar
from benchmarks.server import Server

HOST = "127.0.0.1"
FACTOR, LEAST_FACTOR = 2.0, 1.9
LEAD_S = 2.0  # until the queue is full
# uvloop's timers count whole milliseconds, and may end early: a request is late, never early.
TIMER_S = 0.0015
# Who is answered has waited for the queue. With the images in hand the short one holds about as
# many as the case that its p99 is compared with has callers: 16, the fewest with which batches
# fill. 64 would be the milder comparison.
UNLOADED, SHORT_QUEUE = 16, 8
# Refusing the other half of the requests takes its share of the cores, and so does asking.
LEAST_SHARE = 0.75
CASES = (
    "twice the capacity, default queue",
    f"twice the capacity, queue of {SHORT_QUEUE}",
)
COLUMNS = ["offered_per_s", "refused_share", "refused_p50_ms", "refused_p99_ms"]
OK, REFUSED, LOST = 200, 503, 0


class _Caller(asyncio.Protocol):
    """A kept connection, for one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._status: asyncio.Future[int] | None = None
        self.reusable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """Send a request; return the future of the answer's status, `LOST` if there is none."""
        self._status = self._loop.create_future()
        self._transport.write(request)
        return self._status

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self._end(self._parser.get_status_code())

    def connection_lost(self, _: Exception | None) -> None:
        self.reusable = False
        self._end(LOST)

    def close(self) -> None:
        self._transport.close()

    def _end(self, status: int) -> None:
        if self._status and not self._status.done():
            self._status.set_result(status)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when it was due and sent, when its answer was there, seconds; its status."""

    due: float
    sent: float
    answered: float
    status: int


async def offer(port: int, request: bytes, rate: float, seconds: float) -> list[Ask]:
    """Send a request at a constant rate; return what came of each, in order."""
    loop = asyncio.get_running_loop()
    callers: list[_Caller] = []
    idle: list[_Caller] = []

    async def ask(due: float) -> Ask:
        while idle:
            caller = idle.pop()
            if caller.reusable:
                break
        else:
            try:
                _, caller = await loop.create_connection(_Caller, HOST, port)
            except OSError:
                return Ask(due, time.perf_counter(), time.perf_counter(), LOST)
            callers.append(caller)
        sent = time.perf_counter()
        status = await caller.ask(request)
        idle.append(caller)
        return Ask(due, sent, time.perf_counter(), status)

    begun = time.perf_counter()
    asks = []
    for number in range(round(rate * seconds)):
        due = begun + number / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early + TIMER_S)
        asks.append(loop.create_task(ask(due)))
    found = await asyncio.gather(*asks)
    for caller in callers:
        caller.close()
    return found


def measure(server: Server, capacity: float, seconds: float) -> dict[str, float]:
    """Return the row of a server that is offered `FACTOR` times its capacity, requests/s."""
    lines = [f"POST /predict HTTP/1.1\r\nhost: {HOST}:{server.port}"]
    lines += [f"{name}: {value}" for name, value in server.headers.items()]
    head = "\r\n".join([*lines, f"content-length: {len(server.body)}", "\r\n"])
    gc.freeze()  # a full collection of this process, torch's objects included, takes 0.2 s
    with server.awake(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        asks = runner.run(
            offer(server.port, head.encode() + server.body, FACTOR * capacity, LEAD_S + seconds)
        )
    gc.unfreeze()
    return row(asks, seconds)


def row(asks: list[Ask], seconds: float) -> dict[str, float]:
    """Return the figures of the requests of the last `seconds`, and the answers/s in that time.

    Raises:
        SystemExit: none of them was answered.
    """
    end = asks[-1].due
    counted = [ask for ask in asks if ask.due > end - seconds]
    times = {
        status: np.array([ask.answered - ask.due for ask in counted if ask.status == status])
        for status in (OK, REFUSED)
    }
    if not len(times[OK]):
        raise SystemExit(f"at {FACTOR:g} times the capacity nothing was answered in {seconds} s")
    spent = counted[-1].sent - counted[0].sent
    answers = [ask for ask in asks if ask.status == OK and end - seconds < ask.answered <= end]
    return {
        "per_s": len(answers) / seconds,
        "p50_ms": _percentile(times[OK], 50),
        "p99_ms": _percentile(times[OK], 99),
        "offered_per_s": (len(counted) - 1) / spent,
        "refused_share": len(times[REFUSED]) / len(counted),
        "refused_p50_ms": _percentile(times[REFUSED], 50),
        "refused_p99_ms": _percentile(times[REFUSED], 99),
        "failed_share": 1 - sum(map(len, times.values())) / len(counted),
    }


def _percentile(times: npt.NDArray[np.float64], percent: float) -> float:
    return 1000 * float(np.percentile(times, percent)) if len(times) else 0.0


def bars(
    rows: dict[str, dict[str, Any]], unloaded: str, capacity: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the bars, and those that this run could not measure.

    Args:
        rows: ours, by case.
        unloaded, capacity: the cases that times and throughput are compared with.
    """
    found, skipped = [], []
    for case in CASES:
        here, full = rows[case], rows[capacity]["per_s"]
        if here["offered_per_s"] < LEAST_FACTOR * full:
            why = f"no more than {here['offered_per_s']:.0f} requests/s could be offered"
            skipped.append({"name": case, "why": why})
            continue
        share = here["per_s"] / full
        found.append(bar(f"answered, {case} / capacity", share, "at least", LEAST_SHARE))
        late = here["refused_p99_ms"]
        found.append(bar(f"p99 of the refused, {case}", late, "ms, at most", 50, at_most=True))
        lost = here["failed_share"]
        name = f"share neither answered nor refused, {case}"
        found.append(bar(name, lost, "at most", 0, at_most=True))
        if case == CASES[-1]:
            ratio = here["p99_ms"] / rows[unloaded]["p99_ms"]
            name = f"p99 of the answered, {case} / {UNLOADED} at once"
            found.append(bar(name, ratio, "at most", 2.0, at_most=True))
    return found, skipped
