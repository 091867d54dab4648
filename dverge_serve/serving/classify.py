"""From a request's body to predictions, for every route that takes images."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from dverge_serve.engine.predictions import Predictions
from dverge_serve.serving.batching import Images, Part
from dverge_serve.serving.decoding import INLINE_PIXELS, Decoder
from dverge_serve.serving.loaded_model import ServedModel
from dverge_serve.serving.requests import BodyBudget, Request
from dverge_serve.serving.responses import ServiceError
from dverge_serve.serving.settings import Exposure, Settings
from dverge_serve.serving.watch import Watch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Classifier:
    """The model in service behind the limits.

    Args:
        settings: the limits.
        expose: how much of each answer callers see.
        decoder: turns files into pixels, and long JSON into tensors, off the event loop.
        budget: bounds the bodies held at one moment.
        watch: looks at all images before they are classified, if there is one.
        model: returns the model in service, or refuses.
    """

    settings: Settings
    expose: Exposure
    decoder: Decoder
    budget: BodyBudget
    watch: Watch | None
    model: Callable[[], ServedModel]

    async def classify(
        self,
        request: Request,
        read: Callable[[bytes, ServedModel], Awaitable[tuple[Images, T]]],
    ) -> tuple[ServedModel, T, Part[Predictions]]:
        """Read a request's body and run its images; return the model that did, and their part.

        Args:
            request: whose body it is.
            read: makes images of the body for the model, and whatever else the caller wants of it.

        Raises:
            ServiceError: what `read` refuses, a limit, or no answer in time.
        """
        settings = self.settings
        with self.model() as served, request.holding(self.budget):
            served.check_room()
            body = await request.body(settings.max_body_bytes, settings.timeout_s, self.budget)
            try:
                async with asyncio.timeout(settings.timeout_s):
                    images, rest = await read(body, served)
                    if self.watch:
                        look = partial(self.watch.check, request, images)
                        inline = images[:, 0].size <= INLINE_PIXELS
                        look() if inline else await self.decoder.off_loop(look)
                    part = await request.wait_for(served.submit(images))
            except TimeoutError as error:
                raise ServiceError(
                    "timeout", f"no answer within {settings.timeout_s:g} s"
                ) from error
        return served, rest, part
