"""The registry of training methods: all that differs between them, in one table. Torch-free.

A method of your own needs settings, a function that makes its step, and a call of `register`; all
else, resuming and `dverge train --dry-run`'s estimate among it, is as for the others. The page
`docs/extending.md` has one, whole, and `training.methods.standard` is written the same way.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from training.schedules import Adp, Adversarial, Dverge, Gal, Schedule, Transfer


class RunSettings(Protocol):
    """What the cost of a step depends on; `training.config.Config` has it."""

    @property
    def members(self) -> int:
        """How many there are."""

    @property
    def dverge(self) -> Dverge:
        """How images are distilled."""

    @property
    def adversarial(self) -> Adversarial:
        """How PGD examples are made."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A training method: the stage that follows standard training.

    Args:
        settings: the dataclass of its settings; its `table` is their name in recipes, and the name
            of the stage. Methods may share one.
        make_step: a `training.methods.MakeStep`, or the name of one as `module:function`, which
            is imported when training begins.
        gradients: how many gradients of one member on one image a step computes.
        fresh: begins from new random weights, not from the standard members.
        pairs: whether a step needs target images beside the source.
        sources: whether a step learns from adversarial images of other networks, see
            `training.methods.stored_images`, which are then `make_step`'s last argument.
        members: how many there must be at least.
    """

    settings: type[Schedule]
    make_step: Callable[..., Any] | str
    gradients: Callable[[Any], int] = lambda config: 1
    fresh: bool = False
    pairs: bool = False
    sources: bool = False
    members: int = 2

    def load_make_step(self) -> Callable[..., Any]:
        """Return `make_step`, imported if it is given by name."""
        make: Any = self.make_step
        return pkgutil.resolve_name(make) if isinstance(make, str) else make  # type: ignore[no-any-return]


def _distilled(config: RunSettings) -> int:
    clean = int(config.dverge.clean_weight > 0)
    return config.dverge.steps + config.dverge.partners_of(config.members) + clean


def _attacked(config: RunSettings) -> int:
    return config.adversarial.steps + 1


METHODS = {
    "dverge": Method(
        settings=Dverge,
        make_step="training.methods.dverge_run:make_step",
        gradients=_distilled,
        pairs=True,
    ),
    "standard": Method(
        settings=Schedule, make_step="training.methods.standard:make_step", members=1
    ),
    "adversarial": Method(
        settings=Adversarial,
        make_step="training.methods.adversarial:make_step",
        gradients=_attacked,
        fresh=True,
        members=1,
    ),
    "dverge+adversarial": Method(
        settings=Dverge,
        make_step="training.methods.dverge_run:make_adversarial_step",
        gradients=lambda config: _distilled(config) + _attacked(config),
        pairs=True,
    ),
    "transfer": Method(
        settings=Transfer,
        make_step="training.methods.transfer:make_step",
        gradients=lambda config: 2,  # clean and adversarial
        sources=True,
        members=1,
    ),
    "dverge+transfer": Method(
        settings=Dverge,
        make_step="training.methods.transfer:make_dverge_step",
        gradients=lambda config: _distilled(config) + 2,
        pairs=True,
        sources=True,
    ),
    "adp": Method(settings=Adp, make_step="training.methods.adp:make_step", fresh=True),
    "gal": Method(
        settings=Gal,
        make_step="training.methods.gal:make_step",
        gradients=lambda config: 2,  # the loss's own, and through the gradient
        fresh=True,
    ),
}


def register(name: str, method: Method) -> None:
    """Add a method under the name that recipes call it by.

    Register it before a recipe or a run that uses it is read, in every process that reads one.

    Raises:
        ValueError: the name is taken, or the settings have no `table` of their own.
    """
    if name in METHODS:
        raise ValueError(f"there is a training method '{name}' already")
    if method.settings.table == Schedule.table:
        raise ValueError(f"{method.settings.__name__} needs a `table`, the name of its settings")
    METHODS[name] = method
