"""The cells: every training run the evidence rests on, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence.protocol import DIGITS, DIGITS_FAST, Protocol
from export.source import config_json
from training.config import Config
from training.recipe import load_recipe

SEEDS = (0, 1, 2)
# The paper's procedure to the letter, at the schedule and the radius that digits call for: ten
# steps of a tenth of the radius, BatchNorm in training mode.
EXACT = {"dverge.steps": 10, "dverge.step_size": 0.02, "dverge.batchnorm": "batch"}
ONE_CYCLE = {"standard.schedule": "one-cycle", "dverge.schedule": "one-cycle"}
# A quarter of the exact recipe's gradient evaluations at most. A and B were the best of a first
# search at a quarter and at a ninth, C is the best of `benchmarks.evidence.search`.
FAST: dict[str, dict[str, Any]] = {
    "dverge-3-fast-a": {"dverge.steps": 2, "dverge.step_size": 0.12}
    | {"standard.epochs": 15, "dverge.epochs": 25}
    | ONE_CYCLE,
    "dverge-3-fast-b": {"dverge.steps": 1, "dverge.step_size": 0.2}
    | {"standard.epochs": 12, "dverge.epochs": 15}
    | ONE_CYCLE,
    "dverge-3-fast-c": {"dverge.steps": 1, "dverge.step_size": 0.2, "batch_size": 32}
    | {"standard.epochs": 15, "dverge.epochs": 37}
    | ONE_CYCLE,
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "dverge-3-batch": {"dverge.batchnorm": "batch"},
    "dverge-3-bf16": {"precision": "bf16"},
}
# From whose images a member learns in a step: all the others', or those of one drawn anew, where
# the mean of the weights of the last epochs (as many as in `cifar10-start`) may even out the draws.
PARTNERS: dict[str, dict[str, Any]] = {
    "all": {"dverge.partners": 0},
    "one": {"dverge.partners": 1},
    "mean": {"dverge.partners": 1, "dverge.average": 0.3},
}
SIZES = {"all": (3, 5, 8), "one": (3, 5, 8, 16), "mean": (3, 8)}
METHODS: dict[str, dict[str, Any]] = {
    "adp": {},
    "gal": {"architecture": "resnet8-leaky"},  # as its authors have it: ReLU starves its gradients
    "adversarial": {},
    "dverge+adversarial": {},
    "transfer": {},
    "dverge+transfer": {"dverge.schedule": "one-cycle"},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run and how it is measured.

    Args:
        protocol: the data's common measurement.
        name: of the variant; cells of one name differ by their seed alone.
        method: as in recipes.
        members: how many.
        seed: of the training.
        overrides: what else differs from the recipe.
    """

    protocol: Protocol
    name: str
    method: str
    members: int
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """Its file's name, without the ending."""
        return slug(self.protocol.recipe, self.name, self.seed)

    @property
    def settings(self) -> Config:
        """The run's settings."""
        own = {"members": self.members, "seed": self.seed, "method": self.method}
        whole = dict(self.protocol.overrides) | own | dict(self.overrides)
        return load_recipe(self.protocol.recipe, whole)

    def definition(self) -> dict[str, Any]:
        """Return everything that shapes the cell's figures, except the code."""
        return {"training": config_json(self.settings), "protocol": self.protocol.to_json()}


def slug(recipe: str, name: str, seed: int) -> str:
    """Return the name of a cell's file, without the ending."""
    return f"{recipe}-{name}-seed{seed}".replace("+", "-and-")


def every() -> list[Cell]:
    """Return all cells, the most important first."""
    return [*_digits(DIGITS), *_partners(DIGITS_FAST)]


def _digits(protocol: Protocol) -> Iterator[Cell]:
    for seed in SEEDS:
        yield _cell(protocol, "dverge-3", "dverge", 3, seed)
        yield _cell(protocol, "standard-3", "standard", 3, seed)
    for variants in ({"dverge-3-exact": EXACT} | FAST, OTHERWISE):
        for seed in SEEDS:
            for name, overrides in variants.items():
                yield _cell(protocol, name, "dverge", 3, seed, overrides)
    for method, overrides in METHODS.items():
        for seed in SEEDS:
            yield _cell(protocol, f"{method}-3", method, 3, seed, overrides)
    for members in (2, 5, 8):
        for method in ("dverge", "standard"):
            for seed in SEEDS:
                yield _cell(protocol, f"{method}-{members}", method, members, seed)


def _partners(protocol: Protocol) -> Iterator[Cell]:
    for members in (3, 8, 5, 16):
        for seed in SEEDS:
            for name, overrides in PARTNERS.items():
                if members in SIZES[name]:
                    yield _cell(protocol, f"{name}-{members}", "dverge", members, seed, overrides)


def _cell(
    protocol: Protocol,
    name: str,
    method: str,
    members: int,
    seed: int,
    overrides: Mapping[str, Any] | None = None,
) -> Cell:
    return Cell(
        protocol=protocol,
        name=name,
        method=method,
        members=members,
        seed=seed,
        overrides=overrides or {},
    )
