"""Latency and throughput of a model file, and the engine's overhead over ONNX Runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS
from dverge_serve.engine.session import Engine

SECONDS = 2.0  # for each batch size
LEAST = 3  # turns
CALLS = 3  # in a turn of each, after one that does not count


@dataclass(frozen=True)
class Row:
    """One batch size.

    Args:
        batch: images a call.
        p50_ms, p99_ms: latency of one call of the engine, milliseconds.
        images_per_s: at the median.
        bare_ms: median of a bare `InferenceSession.run` on the same session.
        share: the engine's own part of the time, the median over turns; below 0 it is faster.
    """

    batch: int
    p50_ms: float
    p99_ms: float
    images_per_s: float
    bare_ms: float
    share: float


def measure(engine: Engine, batch: int, seconds: float = SECONDS) -> Row:
    """Time the engine and its bare session in turns on one batch size.

    Args:
        engine: the model.
        batch: images a call.
        seconds: how long, both together.
    """
    images = np.random.default_rng(0).random((batch, *engine.card.input_shape), dtype=np.float32)
    run = partial(engine.run, images)
    run_bare = partial(engine.session.run, [LOGITS, MEMBER_LOGITS], {INPUT: images})
    mine: list[float] = []
    bare: list[float] = []
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < LEAST or time.perf_counter() < end:
        ours, theirs = _calls(run), _calls(run_bare)
        mine += ours
        bare += theirs
        ratios.append(statistics.median(ours) / statistics.median(theirs))
    median = statistics.median(mine)
    return Row(
        batch=batch,
        p50_ms=1000 * median,
        p99_ms=1000 * float(np.percentile(mine, 99)),
        images_per_s=batch / median,
        bare_ms=1000 * statistics.median(bare),
        share=1 - 1 / statistics.median(ratios),
    )


def _calls(call: Callable[[], object]) -> list[float]:
    """Return the seconds of each call, after one warm-up call.

    During that one the threads of the other session still spin.
    """
    times = []
    for _ in range(1 + CALLS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times[1:]
