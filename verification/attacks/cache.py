"""A cache of finished pieces of an evaluation by content hash, so that nothing is made twice.

An interrupted evaluation continues where it stopped, and transfer images serve every model that is
attacked with the same surrogates and data.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from dverge_serve.files import atomic_path, cache_folder, canonical_json, sha256

VERSION = 4  # raise when the same key would give other images, or other arrays
LIMIT_BYTES = 4 * 1024**3
Arrays = dict[str, npt.NDArray[Any]]


def cached(key: Any, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays stored under `key`; on a miss, make and store them.

    Args:
        key: everything that shapes the arrays, as JSON.
        make: called on a miss, and where the file is damaged.
    """
    path = cache_folder() / "attacks" / f"{sha256(canonical_json([VERSION, key]))[:40]}.npz"
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error, NotImplementedError):
        made = make()
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **made)  # type: ignore[arg-type]
    return made


def prune(limit: int = LIMIT_BYTES) -> None:
    """Delete the oldest attack results until the rest fit into `limit` bytes."""
    files = [(each.stat(), each) for each in (cache_folder() / "attacks").glob("*.npz")]
    files.sort(key=lambda item: item[0].st_mtime)
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in files:
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
