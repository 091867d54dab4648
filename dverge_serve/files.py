"""Atomic file writes, content hashes and JSON files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dverge_serve.errors import UserError


def cache_folder() -> Path:
    """Return where caches live: `$DVERGE_CACHE`, by default `~/.cache/dverge`."""
    return Path(os.environ.get("DVERGE_CACHE") or Path.home() / ".cache" / "dverge")


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return `value` as canonical JSON: equal values have equal bytes, and so equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def pretty_json(value: Any) -> bytes:
    """Return `value` as indented JSON ending in a newline, for files people read."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def atomic_path(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds.

    A reader sees the old file or the new one, never a part, also after the process was killed.

    Args:
        path: of the file.
        size: how many bytes it will have, where that is known: a full disk's error says so.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file still stands.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files for the owner alone
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # before the free space is looked at
        raise write_error(path, error, size) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically, making the folder if need be."""
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before time is spent on its content.

    Raises:
        UserError: its folder is not there and cannot be made, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError, size: int = 0) -> UserError:
    """Return the one-line error for a write of `size` bytes to `path` that failed with `error`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left on the disk while writing {path}{_missing(path, size)}",
            next_step="free some space and run the same command again; what was saved stands",
        )
    return UserError(
        f"cannot write {path} ({error.strerror or error})", "a folder that can be written"
    )


def _missing(path: Path, size: int) -> str:
    """Return how many of `size` bytes do not fit on the disk of `path`, if that is known."""
    if not size:
        return ""
    free = size
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(path.parent).free
    if free >= size:  # a quota is full, not the disk
        return f" ({size:,} bytes)"
    return f" ({size:,} bytes, {free:,} free: {size - free:,} missing)"


def read_json(path: Path, what: str) -> Any:
    """Return the JSON in `path`.

    Raises:
        UserError: it is missing, unreadable or not JSON; `what` says what it should have been.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise UserError(f"cannot read {path} ({reason})", what) from error
