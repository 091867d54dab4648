"""Many images on a CPU: every core runs its own part of a batch, or a batch of its own.

One call that all cores share makes them wait for each other after every layer. With enough images,
a session of one thread runs a part on each core without waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dverge_serve.cores import cores
from dverge_serve.engine.card import INPUT, LOGITS, MEMBER_LOGITS, Card, members_per_group
from dverge_serve.engine.outputs import Scores

# A layer's features stay in the cache while about so many pixels, counted for each member that runs
# at once, go through it: 16 images of 32x32 for a network of three or four members, 64 for
# branches.
PIXELS = 65536
EACH = 4  # images that a lane must get to be worth it


class Lanes:
    """Runs large batches in parts, one thread each.

    Args:
        load: makes a session with so many threads for one call.
        card: of the model.
        threads: how many lanes; 0: one for each core.
    """

    def __init__(
        self, load: Callable[[int], ort.InferenceSession], card: Card, threads: int
    ) -> None:
        self.count = threads or cores()
        self.part = part(card)
        self._session = load(1)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="dverge-lane")

    def worth(self, images: int) -> bool:
        """Whether a batch of this many images is faster in lanes."""
        return images >= EACH * self.count

    def run(self, images: npt.NDArray[np.float32], *, here: bool = False) -> Scores:
        """Run float32 `[batch, channels, height, width]` in `[0,1]`; safe from many threads.

        Args:
            images: the batch.
            here: in the caller's thread alone.
        """
        size = min(self.part, len(images) if here else -(-len(images) // self.count))
        parts = [images[at : at + size] for at in range(0, len(images), size)]
        over = map if here or len(parts) == 1 else self._pool.map
        return Scores.concatenate(list(over(self._run, parts)))

    def _run(self, images: npt.NDArray[np.float32]) -> Scores:
        return Scores(*self._session.run([LOGITS, MEMBER_LOGITS], {INPUT: images}))


def part(card: Card) -> int:
    """Return how many images go through the network at once: a power of two."""
    _, height, width = card.input_shape
    members = members_per_group(card.members) if card.form == "grouped" else 1
    fits = PIXELS // (members * height * width)
    return 1 << max(0, fits.bit_length() - 1)
