"""A watch for attacks by queries: callers that send one near-copy of an image after another.

Fingerprints are Blacklight's (Li et al., USENIX Security 2022, section 4): the smallest hashes of
all windows of the quantised image. Two images with many hashes in common are near-copies. What
differs from the paper: windows are square, of a gray image of at most `SIDE` pixels, and those
without any texture do not count; near-copies are counted by the image that they are copies of,
and what is too much is a number of them in a day.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dverge_serve.serving.batching import Images
from dverge_serve.serving.logs import LOGGER
from dverge_serve.serving.metrics import Metrics
from dverge_serve.serving.requests import Request
from dverge_serve.serving.responses import ServiceError
from dverge_serve.serving.settings import Settings

# Larger images are averaged over blocks: pixels of the shorter and of the longer side at most.
SIDE, LONGEST = 32, 512
WINDOW, SMALL_WINDOW, SMALL_SIDE = 5, 3, 16  # pixels, and for images smaller than 16
BIN = 64  # grey levels that count as one
HASHES = 32  # of a fingerprint
SHARED = 12  # hashes in common that make a near-copy
LATEST = 4  # fingerprints that are kept of one image's near-copies
REMEMBERED = 4096  # fingerprints in all
PIXELS_SEEN = 64  # exact copies that are known as such, of one image's near-copies
PERIOD_S = 86_400.0
HEADER = b"x-near-copies"

Hashes = npt.NDArray[np.uint32]
Matrix = npt.NDArray[np.float64]


class Fingerprint:
    """The function from images to their hashes, with random numbers of its own.

    Without these, which differ between any two of them, nobody can tell which changes to an image
    leave its hashes alone.
    """

    def __init__(self) -> None:
        self._offset = secrets.randbelow(2**20) / 2**20
        # A window's weighted sum is below 2**53, so that float64 holds it exactly.
        self._across, self._down = _drawn(22), _drawn(23)
        self._mixing = np.uint64(secrets.randbits(64) | 1)
        self._bands: dict[tuple[int, int, int], Matrix] = {}
        levels = np.arange(256 // BIN + 2, dtype=np.float64)[:, None, None]
        self._plain = {
            window: set(self._windows(np.tile(levels, (window, window)), window).ravel().tolist())
            for window in (WINDOW, SMALL_WINDOW)
        }

    def __call__(self, images: Images) -> list[list[int]]:
        """Return at most `HASHES` hashes of each image, fewer where it has little texture.

        Args:
            images: uint8, or float32 in `[0,1]`, `[N, C, H, W]`.
        """
        gray = _channel_sums(images)
        window = WINDOW if min(gray.shape[1:]) >= SMALL_SIDE else SMALL_WINDOW
        if min(gray.shape[1:]) < window:
            return [[] for _ in gray]
        gray *= np.float32((1 if images.dtype == np.uint8 else 255) / (images.shape[1] * BIN))
        gray += np.float32(self._offset)
        hashes = self._windows(np.floor(gray, dtype=np.float64), window)
        hashes.sort(axis=1)
        plain = self._plain[window]
        found = []
        for row in hashes:
            kept: list[int] = []
            for most in (2 * HASHES, row.size):  # twice as many are nearly always enough
                distinct = dict.fromkeys(row[:most].tolist())
                kept = [each for each in distinct if each not in plain][:HASHES]
                if len(kept) == HASHES:
                    break
            found.append(kept)
        return found

    def _windows(self, levels: Matrix, window: int) -> Hashes:
        """Return the hashes of all windows of levels `[N, H, W]`, `[N, windows]`.

        The weights of a window's pixels are products of one for its column and one for its row.
        """
        height, width = levels.shape[1:]
        sums = self._band(1, height, window) @ (levels @ self._band(0, width, window).T)
        mixed = sums.reshape(len(levels), -1).astype(np.uint64) * self._mixing
        return (mixed >> np.uint64(32)).astype(np.uint32)

    def _band(self, axis: int, side: int, window: int) -> Matrix:
        """Return the matrix that takes `side` values to the weighted sums of windows along them."""
        found = self._bands.get((axis, side, window))
        if found is None:
            found = np.zeros((side - window + 1, side))
            for place, weight in enumerate((self._across, self._down)[axis][:window]):
                np.fill_diagonal(found[:, place:], weight)
            self._bands[axis, side, window] = found
        return found


def _drawn(bits: int) -> list[float]:
    return [float(secrets.randbits(bits) | 1) for _ in range(WINDOW)]


def _channel_sums(images: Images) -> npt.NDArray[np.float32]:
    """Return the sums over the channels, `[N, h, w]`; of large images, their means over blocks."""
    sums = images.sum(axis=1, dtype=np.float32)
    block = max(-(-min(sums.shape[1:]) // SIDE), -(-max(sums.shape[1:]) // LONGEST))
    if block > 1:
        height, width = (side // block for side in sums.shape[1:])
        sums = sums[:, : height * block, : width * block]
        sums = sums.reshape(-1, height, block, width, block).mean((2, 4))
    return np.asarray(sums)


class Sighting(NamedTuple):
    """What the watch knows of one image.

    Args:
        copies: near-copies of one image that have come so far, this one included; 0 if it is none,
            or exactly one that came before.
        wait_s: seconds until another one is within the budget; 0 if this one is.
        told: whether an operator should be told: once, and each time the copies have doubled.
    """

    copies: int = 0
    wait_s: float = 0.0
    told: bool = False


@dataclass(slots=True, eq=False)
class _Family:
    """An image and its near-copies."""

    fingerprints: deque[list[int]] = field(default_factory=deque)
    pixels: deque[int] = field(default_factory=lambda: deque(maxlen=PIXELS_SEEN))
    copies: int = 0
    level: float = 0.0
    since: float = 0.0
    told: int = 0


class NearCopies:
    """The images seen lately, and how many near-copies of each.

    Memory is bounded: `remembered` fingerprints, and what goes first is the image of which no copy
    has come for longest. Calls from several threads are safe.

    Args:
        budget: near-copies of one image that may come at once, and again in each `PERIOD_S`.
        remembered: most fingerprints kept.
        clock: seconds.
    """

    def __init__(
        self,
        budget: int,
        *,
        remembered: int = REMEMBERED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self._remembered, self._clock = remembered, clock
        self._fingerprint = Fingerprint()
        self._lock = threading.Lock()
        self._families: OrderedDict[_Family, None] = OrderedDict()
        self._index: dict[int, _Family] = {}
        self._kept = 0

    def see(self, images: Images) -> list[Sighting]:
        """Look at images, in order, and remember them.

        Args:
            images: uint8, or float32 in `[0,1]`, `[N, C, H, W]`.
        """
        hashes = self._fingerprint(images)
        # What only exact copies have in common: SipHash, by a key that this process drew.
        digests = [hash(image.tobytes()) for image in images]
        with self._lock:
            return list(map(self._see, hashes, digests))

    def _see(self, hashes: list[int], digest: int) -> Sighting:
        if len(hashes) < SHARED:
            return Sighting()
        found: Counter[Any] = Counter(map(self._index.get, hashes))
        found[None] = 0
        family, shared = max(found.items(), key=lambda item: item[1])
        if shared < SHARED:
            family = _Family(since=self._clock())
            sighting = Sighting()
        elif digest in family.pixels:
            self._families.move_to_end(family)
            return Sighting()
        else:
            sighting = self._count(family)
        if not sighting.wait_s:  # else it would be answered when it is sent again
            family.pixels.append(digest)
        self._keep(family, hashes)
        return sighting

    def _count(self, family: _Family) -> Sighting:
        now, rate = self._clock(), self.budget / PERIOD_S
        family.level = max(0.0, family.level - (now - family.since) * rate)
        family.since = now
        family.copies += 1
        if family.level + 1 <= self.budget:
            family.level += 1
            return Sighting(family.copies)
        told = family.copies >= 2 * family.told
        if told:
            family.told = family.copies
        return Sighting(family.copies, (family.level + 1 - self.budget) / rate, told)

    def _keep(self, family: _Family, hashes: list[int]) -> None:
        self._families[family] = None
        self._families.move_to_end(family)
        family.fingerprints.append(hashes)
        self._kept += 1
        if len(family.fingerprints) > LATEST:
            self._forget(family)
        self._index.update(dict.fromkeys(hashes, family))
        while self._kept > self._remembered:
            oldest = next(iter(self._families))
            while oldest.fingerprints:
                self._forget(oldest)
            del self._families[oldest]

    def _forget(self, family: _Family) -> None:
        """Forget the oldest fingerprint of a family."""
        gone = set(family.fingerprints.popleft()).difference(*family.fingerprints)
        for each in gone:
            if self._index.get(each) is family:
                del self._index[each]
        self._kept -= 1


class Watch:
    """The watch of one worker: it counts, logs, and refuses where it should.

    Args:
        settings: whether to refuse, and from how many near-copies of one image on.
        metrics: where they are counted.
        tell: whether answers say in a header what was seen; for the operator alone.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, tell: bool) -> None:
        self._copies = NearCopies(settings.watch_budget)
        self._refuses = settings.watch == "refuse"
        self._metrics, self._tell = metrics, tell

    def check(self, request: Request, images: Images) -> None:
        """Look at a request's images before they are classified.

        Raises:
            ServiceError: one is a near-copy beyond the budget, and the watch refuses these.
        """
        seen = self._copies.see(images)
        over = [each for each in seen if each.wait_s]
        self._metrics.near_copies(sum(each.copies > 0 for each in seen), len(over))
        if not over:
            return
        for each in over:
            if each.told:
                LOGGER.warning(
                    "an attack by queries? %d near-copies of one image so far, more than %d in a "
                    "day; this one %s, in request %s",
                    *(each.copies, self._copies.budget),
                    *("refused" if self._refuses else "answered", request.id),
                )
        if self._tell:
            request.told += ((HEADER, b"%d" % max(each.copies for each in over)),)
        if self._refuses:
            wait = math.ceil(max(each.wait_s for each in over))
            raise ServiceError(
                "near_copies",
                f"too many images that are nearly the same; retry after {wait} s",
                ((b"retry-after", b"%d" % wait),),
            )
