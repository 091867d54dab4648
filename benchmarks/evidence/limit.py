"""A time limit for work that can be interrupted at any moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class TimeUp(BaseException):
    """The minutes are used up. Like KeyboardInterrupt, no handler of errors catches it."""


@contextlib.contextmanager
def within(minutes: float | None) -> Iterator[None]:
    """Raise TimeUp in the main thread, wherever it is, when so many minutes have passed.

    Args:
        minutes: None for no limit.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeUp

    if minutes is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    # Not 0, which would mean no limit at all.
    signal.setitimer(signal.ITIMER_REAL, max(60 * minutes, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
