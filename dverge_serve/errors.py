"""Errors of the user or the environment, each told in one line."""

from __future__ import annotations

import contextlib
import difflib
import enum
import re
from collections.abc import Iterable, Iterator, Mapping


class Exit(enum.IntEnum):
    """Exit codes of the `dverge` command."""

    DONE = 0
    NOT_MET = 1  # --min-accuracy, a replay that differs, an export unlike its network
    USER = 2  # the user's or the environment's mistake
    NOT_VALID = 3  # a verification that is INCONCLUSIVE or INVALID
    BUG = 70
    INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can correct. The command prints it as one line and exits with 2.

    Args:
        found: what was found, naming the file, key or value.
        expected: what was expected in its place.
        next_step: what to do now.
    """

    exit_code = Exit.USER

    def __init__(self, found: str, expected: str = "", next_step: str = "") -> None:
        self.found, self.expected, self.next_step = found, expected, next_step
        parts = [found, f"expected {expected}" if expected else "", next_step]
        super().__init__(" ".join("; ".join(part for part in parts if part).split()))


class PeerError(UserError):
    """An error that another process of the same training reports; this one says nothing of it."""

    def __init__(self) -> None:
        super().__init__("another process of this training failed", next_step="see its message")


class Interrupted(UserError):  # noqa: N818 - Ctrl-C is no error
    """Ctrl-C in work that can go on later.

    Args:
        next_step: how to go on.
    """

    exit_code = Exit.INTERRUPTED

    def __init__(self, next_step: str = "") -> None:
        super().__init__("interrupted", next_step=next_step)


@contextlib.contextmanager
def interruptible(next_step: str) -> Iterator[None]:
    """Turn Ctrl-C in the block into `Interrupted`, which says how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(next_step) from stopped


class NotMetError(UserError):
    """A check that ran and failed: parity at export, `--min-accuracy` at verification."""

    exit_code = Exit.NOT_MET


def brief(error: Exception, most: int = 200) -> str:
    """Return what another library's error says in one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= most:
        return text
    start = text[: most - 4]
    return f"{start.rpartition(' ')[0] or start} ..."


def printable(text: str) -> str:
    """Return the text with `?` for characters that a terminal could obey, e.g. escape codes."""
    return "".join(c if c.isprintable() or c.isspace() else "?" for c in text)


def rename_parameters(text: str, names: Mapping[str, str]) -> str:
    """Return an error's text with parameters as the user knows them.

    Args:
        text: in which a library writes a parameter's name in backticks, e.g. `device`.
        names: by parameter; other words in backticks stay.
    """
    return re.sub("`([a-z0-9_]+)`", lambda found: names.get(found[1], found[0]), text)


def nearest(word: str, options: Iterable[str]) -> str:
    """Return the line that helps after an unknown `word`: the nearest option, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(options)}"


def one_of(names: Iterable[str]) -> str:
    """Return the names as an error lists them: `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}"
