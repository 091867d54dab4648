"""One process at a time in a run directory, however the one before it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dverge_serve.errors import UserError
from dverge_serve.files import write_error

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from training in `folder`, which is made if need be.

    The system holds the lock and lets go of it when the process ends, by a kill too; the file that
    a kill leaves behind hinders nobody.

    Args:
        folder: a run directory.
        wait: until the other process is done, rather than refuse.

    Raises:
        UserError: another process trains there; the folder cannot be written.
    """
    if sys.platform == "win32":  # no flock there: nobody is kept out
        yield
        return
    path = folder / NAME
    descriptor = _take(path, wait)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else can be in the folder
        os.close(descriptor)


def _take(path: Path, wait: bool) -> int:
    """Return a descriptor of the file at `path`, locked."""
    import fcntl

    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                return descriptor  # a file system without locks: nobody is kept out
            holder = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            raise UserError(
                f"another process{holder and f' ({holder})'} is training in {path.parent}",
                next_step="wait until it is done, or train into another --out",
            ) from error
        # The one before may have removed the file between the opening and the lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                with contextlib.suppress(OSError):  # a full disk: who holds it stays unsaid
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        os.close(descriptor)
