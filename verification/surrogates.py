"""Surrogates: standard ensembles an attacker could train, from seeds that no run uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dverge_serve.files import canonical_json, sha256
from training.config import MAX_SEED, Config, Dverge, Verification
from training.data import TrainingData
from training.members import Member, folded
from training.run import Run
from training.train import train

SIZES = (3, 5)
VERSION = 1  # raise when training changes what the same settings give


@dataclass(frozen=True)
class Surrogate:
    """A trained surrogate: its name in the suite, its run and its members."""

    name: str
    run: Run
    members: Sequence[Member]


def cache_folder() -> Path:
    """Return where caches live: `$DVERGE_CACHE`, by default `~/.cache/dverge`."""
    return Path(os.environ.get("DVERGE_CACHE") or Path.home() / ".cache" / "dverge")


def surrogate_config(config: Config, size: int) -> Config:
    """Return how a surrogate is trained: as the defended model's own first stage was.

    Same data, architecture and schedule, another seed: a surrogate that differs more would make
    the model look more robust than it is.
    """
    return replace(
        config,
        name=f"surrogate-{size}",
        method="standard",
        members=size,
        seed=MAX_SEED + size,
        data=replace(config.data, path="", test_limit=0),
        dverge=Dverge(),
        verification=Verification(),
    )


def surrogates(
    config: Config, data: TrainingData, device: torch.device, sizes: Sequence[int] = SIZES
) -> list[Surrogate]:
    """Return the surrogates for a model trained with `config`, training those not in the cache.

    The cache key is the hash of everything that shapes a surrogate. An interrupted training goes
    on where it stopped.
    """
    found = []
    for size in sizes:
        wanted = surrogate_config(config, size)
        key = sha256(canonical_json([VERSION, wanted.to_json(), data.train.sha256]))
        folder = cache_folder() / "surrogates" / f"{size}-{key[:24]}"
        run = train(wanted, folder, device=device, resume=True, data=data)
        members = [folded(member).to(device) for member in run.members()]
        found.append(Surrogate(wanted.name, run, members))
    return found
