"""The settings of a verification; torch-free, so that a mistake is refused at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dverge_serve.engine.radius import parse_radius
from dverge_serve.engine.report import NORMS
from dverge_serve.errors import UserError, one_of
from verification.contract import Contract

if TYPE_CHECKING:
    import torch

    from training.pgd import Norm
    from verification.attacks.attack import Attack


@dataclass(frozen=True)
class Preset:
    """The size of a preset; `attacks.presets` has its attacks.

    Args:
        surrogates: kinds: method and members.
        sample: images that are attacked by queries, drawn at random.
        budgets: queries an image.
        substitute: queries for a substitute trained on the model's answers.
        aware_steps: steps of the attack that knows the detector.
        pixels: that the test images have together which are attacked by default; 0: all images.
        fewest: of these, whatever their pixels.
        checked: images at most for the gates and measurements that cost most; 0: as many as each
            of them likes.
        dearest: whether the dearest attacks run, and the weak ones in every ball.
    """

    surrogates: tuple[str, ...]
    sample: int
    budgets: tuple[int, ...]
    substitute: int
    aware_steps: int
    hop_skip_jump: bool = True
    pixels: int = 0
    fewest: int = 120
    checked: int = 0
    dearest: bool = True

    def images(self, height: int, width: int) -> int:
        """Return how many test images are attacked if nobody says it; 0: all of them."""
        return max(self.fewest, self.pixels // (height * width)) if self.pixels else 0


SUBSTITUTE = "substitute"  # the source of attacks from a stolen model
# Surrogates that differ in size alone are the first members of the largest. The paper's black-box
# protocol has standard ensembles of 3, 5 and 8 members; `mixed` ones have several architectures.
# `full` adds what comes closest to the model itself, and what differs from it in kind.
MIXED = ("mixed-3", "mixed-5")
PAPER = (*MIXED, "standard-3", "standard-5", "standard-8")
PRESETS = {
    "quick": Preset(
        MIXED,
        sample=80,
        budgets=(100, 1000),
        substitute=1000,
        aware_steps=20,
        hop_skip_jump=False,
        pixels=250_000,
    ),
    "standard": Preset(
        PAPER, sample=100, budgets=(100, 1000, 5000), substitute=2000, aware_steps=50
    ),
    "full": Preset(
        (*PAPER, "dverge-3", "deeper-3", "adversarial-3"),
        sample=200,
        budgets=(100, 1000, 5000),
        substitute=5000,
        aware_steps=100,
    ),
}
# A photograph costs as much as a hundred digits: minutes are to stay minutes.
LARGE = 64 * 64  # pixels; of larger images `quick` takes less
QUICK_LARGE = replace(
    PRESETS["quick"],
    surrogates=("mixed-3",),
    sample=12,
    budgets=(100, 300),
    substitute=400,
    aware_steps=10,
    fewest=60,
    checked=24,
    dearest=False,
)


def preset_for(name: str, crop: tuple[int, int]) -> Preset:
    """Return the size of a preset on images of a height and width."""
    large = crop[0] * crop[1] > LARGE and name == "quick"
    return QUICK_LARGE if large else PRESETS[name]


class Radii(NamedTuple):
    """Radii, and how their user wrote them.

    Args:
        values: the radii; none where they are to be searched for.
        given: the text of each, or `auto` alone.
    """

    values: tuple[float, ...]
    given: tuple[str, ...]


AUTO = "auto"  # written in place of radii: find those at which the control falls


def radii(eps: Any) -> Radii:
    """Return one or several radii, each a number or text such as `8/255`, or `auto`.

    Raises:
        UserError: not a number.
    """
    given = eps if isinstance(eps, Iterable) and not isinstance(eps, str) else (eps,)
    given = tuple(given)
    if given == (AUTO,):
        return Radii((), given)
    try:
        return Radii(tuple(map(parse_radius, given)), tuple(map(str, given)))
    except (TypeError, ValueError) as error:
        expected = "a radius or several, e.g. 0.1, 8/255 or auto"
        told = given[0] if len(given) == 1 else given
        raise UserError(f"`eps` {told!r}", expected) from error


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
    labels: str | None = None  # file or set of class names of a foreign classifier, in its order
    contract: Mapping[str, Any] = field(default_factory=dict)  # fields of its `Contract`
    search_contract: bool = False  # try what `contract` leaves open on held-out images
    surrogates: tuple[Path, ...] = ()  # runs, weights files; by default trained and cached
    url: str | None = None  # a live service of this model, attacked as well
    requests: int = 2000  # most requests to the live service
    requests_a_second: float = 50.0  # most requests per second
    against: Path | None = None  # another model, attacked alike
    eps: tuple[float, ...] = ()  # radii, pixels in [0,1]; by default the recipe's
    eps_given: tuple[str, ...] = ()  # the radii as their user wrote them, or `auto` alone
    norm: Norm = "linf"
    images: int | None = None  # number of test images; by default the recipe's limit
    seed: int = 0
    device: str | torch.device = "auto"
    at_eps: float | None = None  # a radius that must be among those evaluated
    attacks: tuple[Attack, ...] = ()  # run after the preset's, in the same norm

    def __post_init__(self) -> None:
        given = ",".join(f"{eps:g}" for eps in self.eps)
        if self.labels is None and (self.contract or self.search_contract):
            raise UserError("a foreign classifier without `labels`", "its class names in its order")
        if self.labels is not None and self.data is None:
            raise UserError("a foreign classifier without `data`", "the images it is made for")
        Contract.checked(self.contract)
        if self.preset not in PRESETS:
            raise UserError(f"preset '{self.preset}'", one_of(PRESETS))
        if self.norm not in NORMS:
            raise UserError(f"norm '{self.norm}'", one_of(NORMS))
        for attack in self.attacks:
            if attack.norm != self.norm:
                raise UserError(
                    f"the attack '{attack.name}' has norm {attack.norm}",
                    f"the evaluation's, {self.norm}",
                )
        if self.norm == "l2" and self.url is not None:
            raise UserError("`url` with `norm` l2", "linf: RayS and Square are Linf attacks")
        if self.at_eps is not None and self.auto_eps:
            raise UserError("`at_eps` with `eps` auto", "`eps` with radii, or no `at_eps`")
        if self.norm == "l2" and not (self.eps or self.auto_eps):
            raise UserError("`norm` l2 without `eps`", "L2 radii, e.g. `eps` 0.25,0.5")
        most = 1.0 if self.norm == "linf" else math.inf
        if not all(0 < eps <= most and math.isfinite(eps) for eps in self.eps):
            limits = "above 0" if self.norm == "l2" else "above 0 and at most 1"
            expected = f"radii {limits} with commas between, e.g. 0.05,0.1 or 8/255"
            raise UserError(f"`eps` {given}", expected)
        if self.images is not None and self.images < 1:
            raise UserError(f"`images` {self.images}", "1 or more")
        if self.at_eps is not None and self.eps and self.at_eps not in self.eps:
            raise UserError(f"`at_eps` {self.at_eps:g}", f"one of `eps` {given}")
        if self.requests < 10:
            raise UserError(f"`requests` {self.requests}", "10 or more")
        if not self.requests_a_second >= 0.1:  # NaN is refused, too
            raise UserError(f"`requests_a_second` {self.requests_a_second:g}", "0.1 or more")

    @property
    def auto_eps(self) -> bool:
        """Whether the radii are searched for."""
        return self.eps_given == (AUTO,)
