"""Prometheus metrics: ours alone, every label from a closed set, summed over the workers."""

from __future__ import annotations

import os
import re
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dverge_serve.serving.responses import CODES

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
# prometheus_client's own switch for several processes; it must be set before its import.
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
METHODS = ("GET", "HEAD", "POST")

SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NATS = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


class Metrics:
    """What one worker counts. Make it once the worker runs, never at import."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry, multiprocess_mode="livesum")
        self._requests = counter(
            "dverge_requests",
            "Requests answered; status 'gone' where the caller hung up first.",
            ["route", "method", "status"],
        )
        self._seconds = histogram(
            "dverge_request_seconds",
            "From the request's headers to the end of its answer.",
            ["route"],
            buckets=SECONDS,
        )
        refusals = counter("dverge_refusals", "Requests refused, by error code.", ["code"])
        self._refusals = {code: refusals.labels(code) for code in CODES}
        self._predictions = counter(
            "dverge_predictions", "Images classified, by answer.", ["label"]
        )
        self._split = counter(
            "dverge_split_votes", "Images whose members did not all vote for the ensemble's answer."
        )
        self._suspicious = counter(
            "dverge_suspicious", "Images whose members disagree more than the report's threshold."
        )
        self._near_copies = counter(
            "dverge_near_copies", "Images that are nearly, not exactly, one that came before."
        )
        self._over_budget = counter(
            "dverge_near_copies_over_budget",
            "Near-copies beyond DVERGE_WATCH_BUDGET of one image: an attack by queries looks so.",
        )
        self._disagreement = histogram(
            "dverge_disagreement",
            "Jensen-Shannon divergence of the members' answers to an image, nats.",
            buckets=NATS,
        )
        self._batch = histogram("dverge_batch_images", "Images in one engine call.", buckets=IMAGES)
        self._engine = histogram(
            "dverge_engine_seconds", "Time of one engine call.", buckets=SECONDS
        )
        self._waiting = gauge("dverge_queue_images", "Images waiting for the engine.")
        self._model = gauge(
            "dverge_model_info",
            "Workers that serve the model file with this SHA-256.",
            ["name", "sha256"],
        )
        self._alarm = gauge(
            "dverge_alarm_workers",
            "Workers whose model has a report that says when an image is suspicious.",
        )
        self._children: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}

    def request(self, route: str, method: str, status: str, seconds: float) -> None:
        """Count one request. `route` is one of ours or "other"."""
        if method not in METHODS:
            method = "other"
        key = (route, method, status)
        children = self._children.get(key)
        if children is None:
            children = self._requests.labels(*key), self._seconds.labels(route)
            self._children[key] = children
        children[0].inc()
        children[1].observe(seconds)

    def refusal(self, code: str) -> None:
        """Count one refusal by its code."""
        self._refusals[code].inc()

    def batch(self, images: int, seconds: float, waiting: int) -> None:
        """Count one engine call."""
        self._batch.observe(images)
        self._engine.observe(seconds)
        self._waiting.set(waiting)

    def images(
        self, labels: Iterable[str], disagreement: Sequence[float], split: int, suspicious: int
    ) -> None:
        """Count classified images: their answers, and how their members voted."""
        for label, count in Tally(labels).items():
            self._predictions.labels(label).inc(count)
        for value in disagreement:
            self._disagreement.observe(value)
        if split:
            self._split.inc(split)
        if suspicious:
            self._suspicious.inc(suspicious)

    def near_copies(self, copies: int, over: int) -> None:
        """Count near-copies of images that came before, and those of them beyond the budget."""
        if copies:
            self._near_copies.inc(copies)
        if over:
            self._over_budget.inc(over)

    def model(self, name: str, sha256: str, serving: bool, alarm: bool = False) -> None:
        """Say that this worker serves a model file, with an alarm or without, or no longer does."""
        self._model.labels(name, sha256).set(int(serving))
        self._alarm.set(int(alarm))

    def render(self) -> bytes:
        """Return the exposition text, over all workers where there are several."""
        if DIRECTORY not in os.environ:
            return bytes(generate_latest(self._registry))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return bytes(generate_latest(registry))


def forget_dead_workers() -> None:
    """Drop the gauges of workers that are gone, so that sums over the living are right."""
    folder = os.environ.get(DIRECTORY)
    if not folder:
        return
    for file in Path(folder).glob("gauge_live*.db"):
        match = re.fullmatch(r"gauge_live\w+?_(\d+)", file.stem)
        if match and not Path(f"/proc/{match[1]}").exists() and Path("/proc/self").exists():
            mark_process_dead(int(match[1]))  # type: ignore[no-untyped-call]
