"""The contract of every attack, and the parameters that all kinds share.

An attack of your own is a subclass with a `run`:

    @dataclass(frozen=True, kw_only=True)
    class Grey(Attack):
        threat: Threat = "transfer"
        source: str = "none"

        def run(self, model, images, labels, eps, *seed):
            return Crafted(images + (0.5 - images).clamp(-eps, eps))

Give `Grey(name="grey")` to `run_suite` beside the others, or call it as it is:
`attack(model, images, labels, eps)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dverge_serve.engine.report import NORMS
from dverge_serve.errors import UserError, one_of
from training.models.ensemble import Ensemble
from training.pgd import Norm
from verification.attacks.target import Target

Threat = Literal["transfer", "queries", "white_box"]
Model = Callable[[Tensor], Tensor]  # images [N, C, H, W] in [0,1] -> logits [N, classes]
NOTHING = Ensemble([]).eval()  # the model of attacks whose source is `none`
# The JSON form has the same keys for every kind of attack: each key's attribute, and the value
# of kinds without that attribute. Reports and cache keys are made of it.
JSON_FORM: dict[str, tuple[str, Any]] = {
    "name": ("name", None),
    "threat": ("threat", None),
    "source": ("source", None),
    "kind": ("kind", None),
    "loss": ("loss", "none"),
    "output": ("output", "mean-logits"),
    "norm": ("norm", None),
    "steps": ("steps", 0),
    "nearest_steps": ("nearest_steps", 0),
    "targets": ("targets", 0),
    "step_share": ("rel_stepsize", 0.2),
    "decay": ("momentum", None),
    "restarts": ("restarts", None),
    "random_start": ("random_start", True),
    "diversity": ("diversity", 0.0),
    "skip_gamma": ("skip_gamma", 1.0),
    "variance_samples": ("variance_samples", 0),
    "penalty_samples": ("penalty_samples", 0),
    "flat_samples": ("flat_samples", 0),
    "shuffles": ("shuffles", 0),
    "queries": ("queries", 0),
    "answers": ("answers", "none"),
    "sample": ("sample", None),
    "standing_only": ("skip_broken", None),
    "nearest": ("nearest", 1.0),
    "control": ("control", None),
    "only_eps": ("only_eps", None),
    "gate": ("gate", None),
    "levels": ("levels", ()),
}


class Crafted(NamedTuple):
    """What an attack made of a set of images.

    Args:
        images: float32 `[N, C, H, W]` in `[0,1]`, inside the ball.
        queries: int64 `[N]`, queries spent on each image; None if not counted.
    """

    images: Tensor
    queries: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """One attack with all its parameters.

    A subclass that ships here names its kind, which identifies it in reports and in the cache;
    every other is of the kind `own`, and its images are never cached.

    Args:
        name: unique within the suite; the random draws follow from it.
        threat: `transfer` needs nothing of the target, `queries` its answers, `white_box` its
            weights.
        source: the model that `run` is given: a surrogate's name, `target` (the attacked model
            itself), or `none`.
        norm: of the ball; `verify` wants the evaluation's.
        restarts: repetitions with other draws; an image must survive them all. On the target's own
            weights the later ones leave out what the earlier ones broke.
        skip_broken: leave out images that this threat has already broken at this eps, and those
            that stood in the next larger ball.
        nearest: with `skip_broken`, run on this share of the images that are left: those that the
            attacks of this threat have brought nearest to another answer.
        sample: run on that many images, drawn at random, the same for all attacks; 0: on all.
        control: whether an undefended control is attacked too.
        only_eps: run at this radius alone.
        gate: the check this attack was added for; it counts like any other.
    """

    kind: ClassVar[str]
    one_search: ClassVar[bool] = False  # whether one search passes every radius

    name: str
    threat: Threat
    source: str
    norm: Norm = "linf"
    restarts: int = 1
    skip_broken: bool = False
    sample: int = 0
    nearest: float = 1.0
    control: bool = True
    only_eps: float | None = None
    gate: str = ""

    def __init_subclass__(cls, kind: str = "own") -> None:
        cls.kind = kind

    def __post_init__(self) -> None:
        self.check("threat", get_args(Threat))
        self.check("norm", NORMS)

    def check(self, setting: str, known: Iterable[str]) -> None:
        """Raise UserError where a setting is none of the known names."""
        if (value := getattr(self, setting)) not in known:
            raise UserError(f"the attack '{self.name}' has {setting} '{value}'", one_of(known))

    @abstractmethod
    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image.

        Args:
            model: the source in evaluation mode, on the images' device: an `Ensemble` where its
                weights are known, else a plain function.
            images: clean, float32 `[N, C, H, W]` in `[0,1]`.
            labels: int64 `[N]`.
            eps: radius of the ball.
            seed: names the random draws; the same names give the same images.
        """

    def run_radii(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        radii: Sequence[float],
        *seed: int | str,
    ) -> list[Crafted]:
        """Craft adversarial versions at each of several radii; see `run`."""
        return [self.run(model, images, labels, eps, *seed) for eps in radii]

    def seen(self, model: Model) -> Model:
        """Return what the attack may see of a model that it knows by its answers: all of them."""
        return model

    def __call__(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *, seed: int = 0
    ) -> Tensor:
        """Return adversarial images `[N, C, H, W]`: attack without a suite.

        Of several restarts, each image is the first that the model answers wrongly, else the last
        one tried.

        Args:
            model: any classifier in evaluation mode, from images in `[0,1]` to logits.
            images: clean, float32 `[N, C, H, W]` in `[0,1]`.
            labels: int64 `[N]`.
            eps: radius of the ball.
            seed: of every random draw.
        """
        best, right = images.clone(), torch.ones_like(labels, dtype=torch.bool)
        for restart in range(self.restarts):
            if not right.any():
                break
            names = (seed, self.name, str(float(eps)), restart)
            made = self.run(self.seen(model), images[right], labels[right], eps, *names)
            best[right] = made.images.to(images)
            with torch.no_grad():
                right = right & (model(best).argmax(1) == labels)
        return best

    def access(self, target: Target) -> tuple[Model, str] | None:
        """Return what an attack on the target itself is run on, and a hash of it.

        That is the answers of its engine, as a plain function, for an attack that `asks`, else its
        weights. None where those are not known; an empty hash where nothing identifies it.
        """
        if not self.asks:
            return (Ensemble(target.members).eval(), target.weights) if target.members else None

        def answers(images: Tensor) -> Tensor:
            return torch.from_numpy(target.engine.run_all(images.detach().cpu().numpy()).logits)

        # Of the file, and of what a foreign classifier has beside it: its contract, other files.
        digest = getattr(target.engine, "sha256", "")
        card = getattr(target.engine, "card", None)
        return self.seen(
            answers
        ), f"{digest} {card.weights_sha256 if card else ''}" if digest else ""

    @property
    def asks(self) -> bool:
        """Whether, run on the target itself, it is given its answers and not its weights."""
        return self.threat == "queries"

    @property
    def cacheable(self) -> bool:
        """Whether the JSON form says all that shapes the images."""
        return self.kind != "own"

    @property
    def work(self) -> int:
        """Passes through the source, for progress."""
        return 1

    def to_json(self) -> dict[str, Any]:
        """Return every parameter, for the report."""
        return {
            key: getattr(self, attribute, default)
            for key, (attribute, default) in JSON_FORM.items()
        }


@dataclass(frozen=True, kw_only=True)
class ReportedAttack(Attack):
    """An attack of a kind of its user's own, as far as a report knows it: it cannot be run."""

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Raise NotImplementedError: the code of this attack is not in the report."""
        raise NotImplementedError(f"the report does not hold the code of '{self.name}'")
