"""Random generators without state: each draw is seeded by a path of names that says what it is for.

A resumed run needs no saved generator: epoch 7 draws the same numbers whether or not the process
that ran epoch 6 is still alive.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*seed_path: int | str) -> int:
    """Return a 63-bit seed that depends on every part of `seed_path` and nothing else."""
    digest = hashlib.sha256(repr(seed_path).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*seed_path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device`, seeded by `seed_path`."""
    return torch.Generator(device).manual_seed(derive(*seed_path))
