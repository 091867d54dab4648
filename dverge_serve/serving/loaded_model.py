"""A model file in service: its engine, its report, and the threads that feed it."""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from dverge_serve.cores import cores
from dverge_serve.engine.card import Card
from dverge_serve.engine.predictions import Predictions
from dverge_serve.engine.providers import CPU, gpus
from dverge_serve.engine.session import Engine
from dverge_serve.errors import UserError
from dverge_serve.images import FORMATS, load, to_float
from dverge_serve.serving.batching import Batcher, Images, Part
from dverge_serve.serving.metrics import Metrics
from dverge_serve.serving.model_report import read_model_report
from dverge_serve.serving.settings import Settings, as_variables

# Images. On a CPU larger batches take as much longer as they hold; a GPU still gains.
MAX_BATCH, MAX_BATCH_GPU = 32, 64


class ServedModel:
    """One model file, loaded and warm. Building it blocks: do so off the event loop.

    Args:
        settings: which file, which device, how many threads and workers.
        worker: this worker's number from 1, which spreads workers over GPUs.

    Raises:
        UserError: the file, or the report beside it, cannot be used.
    """

    def __init__(self, settings: Settings, worker: int = 1) -> None:
        self._max_queue = settings.queue
        try:
            self.engine = Engine(
                settings.model,
                device=settings.device,
                threads=settings.threads or max(1, cores() // settings.workers),
                expected_sha256=settings.model_sha256,
                # An idle thread that spins takes the core that decodes the next request.
                spinning=False,
                device_id=(worker - 1) % max(1, gpus()),
            )
        except UserError as error:
            raise UserError(as_variables(error)) from error
        self.report = read_model_report(settings.model, self.engine.sha256)
        self.threshold = self.report.threshold
        self._batcher: Batcher[Predictions] | None = None
        self._metrics: Metrics | None = None
        self._users, self._retired = 0, False
        self._max_batch = MAX_BATCH if self.engine.provider == CPU else MAX_BATCH_GPU
        self.engine.warm_up((1, 2))
        _warm_up_codecs(self.card)

    @property
    def card(self) -> Card:
        """What the file says about itself."""
        return self.engine.card

    @property
    def sha256(self) -> str:
        """The file's SHA-256, 64 hex digits."""
        return self.engine.sha256

    def start(self, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        """Begin to take images."""
        self._metrics = metrics
        engine = self.engine
        self._batcher = Batcher(
            self._run,
            loop,
            threads=engine.lanes,
            max_batch=min(self._max_batch, engine.lane_batch),
            max_queue=self._max_queue,
            yields=engine.provider == CPU,
        )

    def __enter__(self) -> Self:
        """Hold the model for one request: until it leaves, a retired model still answers."""
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if self._retired and not self._users:
            self._end()

    def retire(self) -> None:
        """End once the last request that holds this model has left."""
        self._retired = True
        if not self._users:
            self._end()

    def _end(self) -> None:
        if self._batcher:
            self._batcher.close()
            self._batcher = None

    def check_room(self) -> None:
        """Refuse a request that would find the queue full, before any work goes into it.

        Raises:
            ServiceError: the queue is full.
        """
        assert self._batcher, "start() comes first"
        self._batcher.check_room()

    def submit(self, images: Images) -> asyncio.Future[Part[Predictions]]:
        """Queue images for the engine.

        Args:
            images: uint8, or float32 in `[0,1]`, `[batch, channels, height, width]` of the model's
                input shape; the caller has checked them.

        Raises:
            ServiceError: the queue is full.
        """
        assert self._batcher, "start() comes first"
        return self._batcher.submit(images)

    def _run(self, parts: Sequence[Images], alone: bool) -> Predictions:
        images = _joined(parts)
        begun = time.perf_counter()
        scores = self.engine.run_all(images, in_lane=not alone)
        seconds = time.perf_counter() - begun
        found = Predictions(scores, self.card.labels)
        if not all(map(math.isfinite, found.disagreement)):  # JSON would have null in its place
            raise ArithmeticError("the model's answer is not a number")
        metrics, batcher = self._metrics, self._batcher
        if metrics and batcher:  # a batch can be quicker than the batcher's constructor
            metrics.batch(len(found), seconds, batcher.waiting)
            split = sum(share < 1 for share in found.agreement)
            suspicious = sum(map(self.is_suspicious, found.disagreement))
            metrics.images(found.labels(), found.disagreement, split, suspicious)
        return found

    def is_suspicious(self, disagreement: float) -> bool:
        """Whether members that disagree this much should raise an alarm."""
        return self.threshold is not None and disagreement > self.threshold


def _warm_up_codecs(card: Card) -> None:
    # Pillow loads each codec at its first image, which takes many times an answer's time.
    blank = Image.new(card.preprocess.mode, card.preprocess.crop[::-1])
    for kind in FORMATS:
        file = io.BytesIO()
        blank.save(file, kind)
        load(file.getvalue(), card.preprocess)


def _joined(parts: Sequence[Images]) -> npt.NDArray[np.float32]:
    if all(part.dtype == np.uint8 for part in parts):
        return to_float(parts[0] if len(parts) == 1 else np.concatenate(parts))
    floats = [to_float(part) if part.dtype == np.uint8 else part for part in parts]
    return floats[0] if len(floats) == 1 else np.concatenate(floats)
