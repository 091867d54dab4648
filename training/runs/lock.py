"""Locks between processes: one trains in a run directory, or verifies a model, at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dverge_serve.errors import UserError
from dverge_serve.files import write_error

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from training in `folder`, which is made if need be.

    Args:
        folder: a run directory.
        wait: until the other process is done, rather than refuse.

    Raises:
        UserError: another process trains there; the folder cannot be written.
    """
    with held(
        folder / NAME,
        f"is training in {folder}",
        "wait until it is done, or train into another `out`",
        wait=wait,
    ):
        yield


@contextlib.contextmanager
def held(path: Path, busy: str, next_step: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file, which is made, its folder too if need be, and deleted at the end.

    The system holds the lock and lets go of it when the process ends, by a kill too; the file that
    a kill leaves behind does no harm. On a file system without locks nobody is kept out.

    Args:
        path: of the lock.
        busy: what another process does that holds it, e.g. "is training in runs/a".
        next_step: what to do about it.
        wait: until the other process is done, rather than refuse.

    Raises:
        UserError: another process holds it; the folder cannot be written.
    """
    # Not its soft lock: that keeps a record of its own in the file, and outlives a kill.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise write_error(path, error) from error
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        holder = ""
        with contextlib.suppress(OSError):  # Windows shows nobody what is in a locked file
            holder = path.read_text(encoding="utf-8", errors="replace")
        raise UserError(
            f"another process{holder and f' ({holder})'} {busy}", next_step=next_step
        ) from error
    except OSError:  # the file system has no locks
        pass
    try:
        with contextlib.suppress(OSError):  # a full disk: who holds it stays unsaid
            path.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else can be in the folder
        lock.release()
