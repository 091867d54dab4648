"""Randomness without state: every draw has its own generator, named by what it is for.

A resumed run needs no saved generator: epoch 7 draws the same numbers whether or not the process
that ran epoch 6 is still alive.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*names: int | str) -> int:
    """Return a 63-bit seed that depends on all of `names` and nothing else."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on `device`, seeded by `names`."""
    return torch.Generator(device).manual_seed(derive(*names))
