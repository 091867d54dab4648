"""Fixed batch sizes with input and output buffers that stay on the device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS, Card
from dverge_serve.engine.outputs import Scores

LARGEST = 64  # images; larger batches are run in parts


class Buckets:
    """Runs every batch at the next power of two, padded with black images.

    cuDNN chooses its algorithms, and the arena its blocks, for each new shape; with seven shapes
    that is done after the warm-up. Input and outputs stay bound to the same device memory. One
    call at a time: the device would not run two at once either.

    Args:
        session: on the device.
        card: of the model.
        device: ONNX Runtime's name of it, `cuda` or `cpu`.
        device_id: which one.
    """

    def __init__(
        self, session: ort.InferenceSession, card: Card, device: str, device_id: int
    ) -> None:
        self._session, self._card = session, card
        self._where = (device, device_id)
        self._lock = threading.Lock()
        self._buckets: dict[int, tuple[Any, Any, Any, Any]] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes in use: 1, 2, 4, ... up to `LARGEST`."""
        return tuple(2**power for power in range(LARGEST.bit_length()))

    def run(self, images: npt.NDArray[np.float32]) -> Scores:
        """Run float32 `[batch, channels, height, width]` in `[0,1]`, any batch of 1 or more."""
        with self._lock:
            parts = [images[at : at + LARGEST] for at in range(0, len(images), LARGEST)]
            return Scores.concatenate([self._run(part) for part in parts])

    def _run(self, images: npt.NDArray[np.float32]) -> Scores:
        count = len(images)
        size = next(size for size in self.sizes if size >= count)
        if size != count:
            padding = np.zeros((size - count, *images.shape[1:]), np.float32)
            images = np.concatenate([images, padding])
        binding, given, logits, member_logits = self._bucket(size)
        given.update_inplace(np.ascontiguousarray(images))
        self._session.run_with_iobinding(binding)
        # Copies: on the CPU `numpy` may show the buffer itself, which the next call overwrites.
        return Scores(logits.numpy()[:count].copy(), member_logits.numpy()[:count].copy())

    def _bucket(self, size: int) -> tuple[Any, Any, Any, Any]:
        if size not in self._buckets:
            classes = len(self._card.labels)
            shapes = (self._card.input_shape, (classes,), (self._card.members, classes))
            given, logits, member_logits = (
                ort.OrtValue.ortvalue_from_shape_and_type((size, *shape), np.float32, *self._where)
                for shape in shapes
            )
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(INPUT, given)
            binding.bind_ortvalue_output(LOGITS, logits)
            binding.bind_ortvalue_output(MEMBER_LOGITS, member_logits)
            self._buckets[size] = (binding, given, logits, member_logits)
        return self._buckets[size]
