"""Surrogates: ensembles that an attacker could train, from seeds that no run uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError
from dverge_serve.files import cache_folder, canonical_json, sha256
from training.config import MAX_SEED, Config, Verification
from training.data.splits import TrainingData
from training.models.member import Member
from training.models.resnet import deeper
from training.runs.directory import Run
from training.schedules import Dverge
from training.trainer import train
from verification.gradients import ready

VERSION = 1  # raise when training changes what the same settings give


@dataclass(frozen=True)
class Surrogate:
    """A trained surrogate: its name in the suite, its run and its members."""

    name: str
    run: Run
    members: Sequence[Member]

    def to_json(self) -> dict[str, Any]:
        """Return its entry in the report."""
        config = self.run.config
        return {
            "name": self.name,
            "method": config.method,
            "architecture": config.architecture,
            "members": config.members,
            "seed": config.seed,
            "weights_sha256": self.run.weights_sha256,
            "holdout_accuracy": self.run.checkpoint["holdout_accuracy"],
        }


def surrogate_config(config: Config, kind: str) -> Config | None:
    """Return the settings of a surrogate: those of the defended model's first stage.

    Same data, architecture and schedule, another seed: a surrogate that differs more would make
    the model look more robust than it is. `deeper` has another architecture, `dverge` is the
    defence itself from another seed, `adversarial` a lightly adversarially trained one.

    Args:
        config: of the defended model.
        kind: method and members, e.g. `standard-3`.

    Returns:
        None where this version cannot train that kind.
    """
    method, _, size = kind.rpartition("-")
    named = config.architecture
    architectures = (named,) if isinstance(named, str) else named
    base = replace(
        config,
        name=f"surrogate-{kind}",
        method="standard",
        architecture=named if isinstance(named, str) else tuple(islice(cycle(named), int(size))),
        members=int(size),
        seed=MAX_SEED + int(size),
        data=replace(config.data, path="", test_limit=0, memory_gb=None, workers=None),
        start="",
        tensorboard=False,
        dverge=Dverge(),
        verification=Verification(),
    )
    if method == "standard":
        return base
    if method == "deeper":
        other = deeper(architectures[0])
        return replace(base, architecture=other) if other else None
    if method == "dverge":
        return replace(base, method="dverge", dverge=config.dverge)
    if method == "adversarial":
        # Lightly: at the smallest radius that is evaluated (Springer et al., 2021).
        eps = min(config.verification.eps)
        light = replace(config.adversarial, eps=eps, step_size=eps / 4)
        return replace(base, method="adversarial", adversarial=light)
    return None


def surrogate_configs(config: Config, kinds: Sequence[str]) -> dict[str, Config]:
    """Return the settings of the surrogates that this version can train, by kind."""
    found = {kind: surrogate_config(config, kind) for kind in kinds}
    return {kind: wanted for kind, wanted in found.items() if wanted is not None}


def surrogates(
    config: Config, data: TrainingData, device: torch.device, kinds: Sequence[str]
) -> list[Surrogate]:
    """Return the surrogates for a model trained with `config`, training those not in the cache.

    The cache key is the hash of everything that shapes a surrogate. An interrupted training
    continues where it stopped; one that runs in another process is waited for. Kinds that this
    version cannot train are left out.
    """
    found = []
    for kind, wanted in surrogate_configs(config, kinds).items():
        folder = surrogate_folder(kind, wanted, data)
        run = train(
            wanted, folder, device=device, resume=True, data=data, wait=True, surrogate=True
        )
        found.append(_opened(wanted.name, run, device))
    return found


def surrogate_folder(kind: str, wanted: Config, data: TrainingData) -> Path:
    """Return the folder of a surrogate's run in the cache."""
    key = sha256(canonical_json([VERSION, wanted.to_json(), data.train.sha256]))
    return cache_folder() / "surrogates" / f"{kind}-{key[:24]}"


def given_surrogates(folder: Path, card: Card, device: torch.device) -> list[Surrogate]:
    """Return the finished runs in a folder as surrogates for the model of `card`.

    Raises:
        UserError: none there, or one with other classes or another input.
    """
    labels = card.labels
    runs = sorted(path.parent for path in folder.glob("*/checkpoint.json"))
    if not runs:
        raise UserError(f"no finished run in {folder}", "a folder of run directories")
    found = []
    for path in runs:
        run = Run.open_finished(path)
        if run.labels != tuple(labels):
            raise UserError(
                f"the surrogate {path} has {len(run.labels)} classes ({', '.join(run.labels[:3])})",
                f"the model's {len(labels)} ({', '.join(labels[:3])})",
            )
        if (shape := run.config.data.preprocess.shape) != card.input_shape:
            raise UserError(
                f"the surrogate {path} takes {shape}", f"the model's {card.input_shape}"
            )
        found.append(_opened(path.name, run, device))
    return found


def _opened(name: str, run: Run, device: torch.device) -> Surrogate:
    return Surrogate(name, run, [ready(member, device, lowered=True) for member in run.members()])
