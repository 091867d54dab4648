"""Decoding for the service: small images at once, large ones off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dverge_serve.images import ImageError, Preprocess, load
from dverge_serve.serving.responses import ServiceError

# Below these bounds decoding takes less time than handing the bytes to a thread and back.
INLINE_BYTES = 16_384
INLINE_FILES = 4
INLINE_PIXELS = 16_384
# Pixels of all images of a request, or `max_pixels` if that is more. A megabyte holds 64 flat
# pictures of 16 million pixels, which take ten seconds.
MOST_PIXELS = 67_108_864

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


class Decoder:
    """Turns image files into the model's input.

    Args:
        max_pixels: largest image, width x height.
        threads: most images decoded at a time off the event loop; each may need 24 bytes a pixel.
    """

    def __init__(self, max_pixels: int, threads: int) -> None:
        self._max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dverge-decode")

    async def decode(self, files: list[bytes], preprocess: Preprocess) -> Pixels:
        """Decode and preprocess `files`.

        Returns:
            uint8 `[len(files), channels, height, width]`.

        Raises:
            ServiceError: one of them cannot be taken; of several, the message names its position.
        """
        if len(files) <= INLINE_FILES and sum(map(len, files)) <= INLINE_BYTES:
            try:
                return decode(files, preprocess, min(self._max_pixels, INLINE_PIXELS))
            except ServiceError as error:
                if error.code != "image_too_large" or self._max_pixels <= INLINE_PIXELS:
                    raise
        given_up = threading.Event()
        try:
            return await self.off_loop(
                partial(decode, files, preprocess, self._max_pixels, given_up)
            )
        finally:  # the caller may be gone: the thread stops after its present image
            given_up.set()

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Do any other long work in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Drop what is queued and let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def decode(
    files: list[bytes],
    preprocess: Preprocess,
    max_pixels: int,
    given_up: threading.Event | None = None,
) -> Pixels:
    """Decode and preprocess `files` in this thread; returns and raises as `Decoder.decode`.

    Args:
        files: PNG, JPEG or WebP bytes.
        preprocess: the model's.
        max_pixels: largest image, width x height.
        given_up: once set, no further image is decoded, as the caller is gone.
    """
    arrays = []
    most = left = max(MOST_PIXELS, max_pixels)

    def admit(pixels: int) -> None:
        nonlocal left
        left -= pixels
        if left < 0:
            raise ImageError("image_too_large", f"the images have more than {most} pixels together")

    for position, data in enumerate(files, start=1):
        if given_up is not None and given_up.is_set():
            raise CancelledError
        try:
            arrays.append(load(data, preprocess, max_pixels=max_pixels, admit=admit))
        except ImageError as error:
            where = f"image {position} of {len(files)}: " if len(files) > 1 else ""
            raise ServiceError(error.code, f"{where}{error}") from error
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
