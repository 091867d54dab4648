"""A worker process: the model in service, from loading to shutdown."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dverge_serve.engine.trust import Trust
from dverge_serve.errors import UserError
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.logs import LOGGER
from dverge_serve.serving.metrics import Metrics
from dverge_serve.serving.reload import ModelVersions, Reloader
from dverge_serve.serving.responses import ServiceError
from dverge_serve.serving.settings import Settings

# A thread that waits for the interpreter's lock gets it after so long: the threads of the engine
# need it for moments, several times a batch, while the event loop always has something to do.
SWITCH_S = 0.0002


class Worker:
    """The model that this process serves, its loading and its reloads.

    Args:
        settings: how it runs.
        number: among the workers of one server, from 1.
        folder: what the workers of one server share; one of its own where it is alone.
        on_failure: called when the model cannot be loaded.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        number: int = 1,
        folder: Path | None = None,
        on_failure: Callable[[UserError], None] | None = None,
    ) -> None:
        self.settings, self.number = settings, number
        self.metrics = Metrics()
        self.served: ServedModel | None = None
        self.loading: asyncio.Task[None] | None = None
        self._on_failure = on_failure
        self._folder = folder
        self._trust: Trust | None = None
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._reloader: Reloader | None = None
        self._watch: asyncio.Task[None] | None = None
        self._all_started = False

    async def start(self) -> None:
        """Begin to load the model."""
        sys.setswitchinterval(SWITCH_S)
        if self._folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="dverge-")
            self._folder = Path(self._own_folder.name)
        self._trust = self.settings.trust
        versions = ModelVersions(self._folder, self._trust)
        self._reloader = Reloader(versions, self.settings, self.number, self._serve)
        self.loading = asyncio.get_running_loop().create_task(self._load())
        if self._reloader.any_served:
            # Other workers answer already; this one takes no connection before it can, too.
            await self.loading

    async def stop(self) -> None:
        """Finish queued work and release the model."""
        if self.loading:
            await self.loading
        if self._watch:
            self._watch.cancel()
        if self.served:
            self._retire(self.served)
        if self._own_folder:
            self._own_folder.cleanup()

    def model(self) -> ServedModel:
        """Return the model in service.

        Raises:
            ServiceError: it is still loading.
        """
        if self.served is None:
            raise ServiceError("starting", "the model is still loading; retry later")
        return self.served

    @property
    def has_served(self) -> bool:
        """Whether any worker of this server has ever served a model."""
        return self._reloader is not None and self._reloader.any_served

    def check_ready(self) -> None:
        """Check that a request would be answered, whichever worker it reaches.

        Raises:
            ServiceError: this one or another is still loading.
        """
        self.model()
        if not self._all_started:
            assert self._reloader
            self._all_started = self._reloader.all_served
        if not self._all_started:
            raise ServiceError("starting", "other workers are still loading the model; retry later")

    async def reload(self) -> dict[str, Any]:
        """Put the file now at the model's path in service, in every worker; return the outcome.

        Raises:
            ServiceError: it cannot be; the old one stays.
        """
        before = self.model().sha256
        assert self._reloader
        found = await self._reloader.reload()
        served = self.model()
        report = {"report": served.report.state, "alarm": served.threshold is not None}
        return {"sha256": served.sha256, "previous_sha256": before, **report, **found}

    async def _load(self) -> None:
        reloader = self._reloader
        assert reloader
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        try:
            served = await loop.run_in_executor(None, reloader.load_current)
        except Exception as error:
            told = f"cannot load {self.settings.model} ({type(error).__name__}: {error})"
            unforeseen = UserError(told, "a model, and memory for it")
            cause = error if isinstance(error, UserError) else unforeseen
            LOGGER.error("cannot serve: %s", cause, exc_info=None if cause is error else error)
            if self._on_failure:
                self._on_failure(cause)
            return
        self._serve(served)
        # A full collection takes 70 ms of a worker's life while everybody waits; almost all that it
        # looks at are the libraries, which stay.
        gc.freeze()
        LOGGER.info("worker %d is ready after %.1f s", self.number, time.perf_counter() - begun)
        reloader.announce(served)
        self._watch = loop.create_task(reloader.watch())

    def _retire(self, served: ServedModel) -> None:
        self.metrics.model(served.card.name, served.sha256, serving=False)
        served.retire()

    def _serve(self, served: ServedModel) -> None:
        """Put a model in service; requests that hold the old one finish with it."""
        served.start(asyncio.get_running_loop(), self.metrics)
        old, self.served = self.served, served
        if old:
            self._retire(old)
        alarm = served.threshold is not None
        self.metrics.model(served.card.name, served.sha256, serving=True, alarm=alarm)
        LOGGER.log(
            logging.INFO if alarm else logging.WARNING,
            "worker %d serves %s (%s, sha256 %s) on %s with %s; %s",
            self.number,
            served.card.name,
            self.settings.model,
            served.sha256,
            served.engine.provider,
            served.report.told,
            f"signed by {self._trust.told}" if self._trust else "no signature is asked for",
        )
