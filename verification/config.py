"""The settings of a verification; torch-free, so that a mistake is refused at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dverge_serve.errors import UserError

if TYPE_CHECKING:
    import torch

    from training.pgd import Norm
    from verification.attacks.attack import Attack

PRESETS = ("quick", "standard", "full")


@dataclass(frozen=True, kw_only=True)
class VerificationConfig:
    """The settings of a verification.

    Raises:
        UserError: a value outside its range, or two that exclude each other.
    """

    model: Path
    preset: str = "quick"  # the attack suite, one of PRESETS
    run: Path | None = None  # by default the run with these weights, if it is found
    checkpoint: Path | None = None  # of the paper's published code, for gradients
    data: str | None = None  # a folder or a data set's name; by default the run's own
    labels: str | None = None  # file or set of class names of a foreign classifier: black-box only
    surrogates: Path | None = None  # a folder of runs; by default trained and cached
    url: str | None = None  # a live service of this model, attacked as well
    requests: int = 2000  # at most, to the live service
    requests_a_second: float = 50.0  # at most
    against: Path | None = None  # another model, attacked alike
    eps: tuple[float, ...] = ()  # radii, pixels in [0,1]; by default the recipe's
    norm: Norm = "linf"
    images: int | None = None  # number of test images; by default the recipe's limit
    seed: int = 0
    device: str | torch.device = "auto"
    at_eps: float | None = None  # a radius that must be among those evaluated
    attacks: tuple[Attack, ...] = ()  # run after the preset's

    def __post_init__(self) -> None:
        radii = ",".join(f"{eps:g}" for eps in self.eps)
        if self.preset not in PRESETS:
            raise UserError(f"preset '{self.preset}'", "quick, standard or full")
        if self.norm not in ("linf", "l2"):
            raise UserError(f"norm '{self.norm}'", "linf or l2")
        if self.norm == "l2" and self.url is not None:
            raise UserError("`url` with `norm` l2", "linf: Square is an Linf attack")
        if self.norm == "l2" and not self.eps:
            raise UserError("`norm` l2 without `eps`", "L2 radii, e.g. `eps` 0.25,0.5")
        most = 1.0 if self.norm == "linf" else math.inf
        if not all(0 < eps <= most and math.isfinite(eps) for eps in self.eps):
            raise UserError(f"`eps` {radii}", "radii above 0 with commas between, e.g. 0.05,0.1")
        if self.images is not None and self.images < 1:
            raise UserError(f"`images` {self.images}", "1 or more")
        if self.at_eps is not None and self.eps and self.at_eps not in self.eps:
            raise UserError(f"`at_eps` {self.at_eps:g}", f"one of `eps` {radii}")
