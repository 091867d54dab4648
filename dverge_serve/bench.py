"""How fast a model file is here: latency and throughput, and what of it is the engine's own."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dverge_serve.contract import INPUT, LOGITS, MEMBER_LOGITS
from dverge_serve.engine import Engine

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = 2.0  # for each batch size
LEAST = 5


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
    session = engine.session
    images = np.random.default_rng(0).random((batch, *engine.card.input_shape), dtype=np.float32)
    given = {INPUT: images}
    mine: list[float] = []
    bare: list[float] = []
    engine.run(images)
    end = time.perf_counter() + seconds
    while len(mine) < LEAST or time.perf_counter() < end:
        begun = time.perf_counter()
        engine.run(images)
        between = time.perf_counter()
        session.run([LOGITS, MEMBER_LOGITS], given)
        mine.append(between - begun)
        bare.append(time.perf_counter() - between)
    ratios = [a / b for a, b in zip(mine, bare, strict=True)]
    median = statistics.median(mine)
    return Row(
        batch=batch,
        p50_ms=1000 * median,
        p99_ms=1000 * _percentile(mine, 99),
        images_per_s=batch / median,
        bare_ms=1000 * statistics.median(bare),
        share=1 - 1 / statistics.median(ratios),
    )


def _percentile(values: list[float], percent: float) -> float:
    found: npt.NDArray[np.float64] = np.percentile(np.asarray(values), percent, keepdims=True)
    return float(found[0])
