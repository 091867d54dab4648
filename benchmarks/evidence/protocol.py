"""How every cell of a data set is measured: the same attacks from the same surrogates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dverge_serve.files import cache_folder, canonical_json, sha256
from export.source import config_json
from training.config import Config
from training.data.splits import TrainingData, load_training
from training.recipe import load_recipe
from training.trainer import train
from verification.surrogates import surrogate_config


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to measure, shared by all cells of a recipe.

    Args:
        recipe: whose standard stage the surrogates go through, whatever a cell changes.
        overrides: of that recipe, for rehearsals.
        surrogates: kinds, e.g. `standard-3`; trained once, from seeds no run uses.
        eps: Linf radii, pixels in `[0,1]`.
        images: test images used; 0 for all.
        preset: of `dverge verify-robustness`.
        seed: of the attacks' random starts.
    """

    recipe: str
    surrogates: tuple[str, ...]
    eps: tuple[float, ...]
    images: int = 0
    preset: str = "quick"
    seed: int = 0
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> Config:
        """The recipe."""
        return load_recipe(self.recipe, dict(self.overrides))

    def to_json(self) -> dict[str, Any]:
        """Return what shapes the figures; the surrogates with all their settings."""
        table = asdict(self) | {"surrogates": {}}
        for kind in self.surrogates:
            config = surrogate_config(self.config, kind)
            assert config is not None
            table["surrogates"][kind] = config_json(config)
        return table


DIGITS = Protocol(recipe="digits", surrogates=("standard-3", "standard-5"), eps=(0.05, 0.1, 0.15))
# Where each member learns from one other's images at a time beside where it learns from all.
DIGITS_FAST = Protocol(recipe="digits-fast", surrogates=DIGITS.surrogates, eps=DIGITS.eps)


def evidence_cache() -> Path:
    """Return where models and surrogates are kept between calls."""
    return cache_folder() / "evidence"


def trained_surrogates(protocol: Protocol, device: torch.device) -> Path:
    """Return a folder of finished surrogate runs, training those that are not there yet.

    An interrupted training goes on where it stopped.
    """
    config = protocol.config
    data = load_training(config.data)
    wanted = {kind: surrogate_config(config, kind) for kind in protocol.surrogates}
    key = sha256(canonical_json([protocol.to_json()["surrogates"], data.train.sha256]))
    folder = evidence_cache() / "surrogates" / f"{protocol.recipe}-{key[:16]}"
    for kind, each in wanted.items():
        assert each is not None
        train(each, folder / kind, device=device, resume=True, data=data, surrogate=True)
    return folder


def training_data(protocol: Protocol) -> TrainingData:
    """Return the images cells may learn from, and the held-out ones."""
    return load_training(protocol.config.data)
