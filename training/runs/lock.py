"""Lock of a run directory: one process trains there at a time."""

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

    The system holds the lock and lets go of it when the process ends, by a kill too; the file that
    a kill leaves behind does no harm. On a file system without locks nobody is kept out.

    Args:
        folder: a run directory.
        wait: until the other process is done, rather than refuse.

    Raises:
        UserError: another process trains there; the folder cannot be written.
    """
    path = folder / NAME
    # Not its soft lock: that keeps a record of its own in the file, and outlives a kill.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
            f"another process{holder and f' ({holder})'} is training in {folder}",
            next_step="wait until it is done, or train into another `out`",
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
