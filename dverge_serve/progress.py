"""Progress with time left: a bar on a terminal, plain lines anywhere else.

Nothing is shown before `show()`: the commands call it; in a notebook you do.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 5.0
KNOWN = 0.02  # of the work: before that much is done, nobody knows how long the rest will take
BESIDE = 28  # columns that percent, time left, gaps and a bar that still is one take


class Progress:
    """One running task, shown on standard error after `show()`.

    Args:
        label: what is being done, e.g. "DVERGE training".
        total: how many units the whole task has.
        start: units already done (a resumed run).
    """

    shown = False

    def __init__(self, label: str, total: int, *, start: int = 0) -> None:
        self._label, self._total, self._done = label, max(total, 1), start
        self._begun, self._begun_done = time.monotonic(), start
        self._said, self._note = self._begun, ""
        self._rich: RichProgress | None = None
        self._over = threading.Event()
        if self.shown and sys.stderr.isatty():
            self._rich = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._rich.add_task(label, total=self._total, completed=start, note="")

    def __enter__(self) -> Progress:
        if self._rich:
            self._rich.start()
        elif self.shown:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._rich:
            self._rich.stop()
        elif kind is None:
            seconds = time.monotonic() - self._begun
            self._line(f"done in {duration(seconds)}")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done; `note` is a short line of figures to show beside them."""
        self._done += units
        self._note = note or self._note  # stands until the next one
        if self._rich:
            room = self._rich.console.width - len(self._label) - BESIDE
            self._rich.update(self._task, completed=self._done, note=fitting(self._note, room))
            return
        self._tell()

    def _beat(self) -> None:
        """Say how far it is while one unit takes long."""
        while not self._over.wait(LINE_EVERY_S):
            self._tell()

    def _tell(self) -> None:
        """Say how far it is, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            made = self._done - self._begun_done
            seconds = (self._total - self._done) * (now - self._begun) / max(made, 1)
            left = duration(seconds) if made > KNOWN * self._total else "?"
            percent = 100 * self._done // self._total
            self._line(f"{percent:3d}%, {left} left{', ' + self._note if self._note else ''}")

    def _line(self, text: str) -> None:
        if self.shown:
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)  # noqa: T201


def show() -> None:
    """Show the progress of all work of this process from now on, on standard error."""
    Progress.shown = True


def fitting(note: str, room: int) -> str:
    """Return as many of the figures of `note`, from the first, as `room` columns hold."""
    while len(note) > room:
        note = note.rpartition(", ")[0]
    return note


def say(line: str) -> None:
    """Print a line on standard error, if progress is shown."""
    if Progress.shown:
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def duration(seconds: float) -> str:
    """Return `seconds` in a short form for people, e.g. "2m 05s"."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def gigabytes(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1024**3:.1f} GB" if size >= 1024**3 // 10 else f"{size / 1024**2:.1f} MB"
