"""Who survived what: the per-image outcome matrix of one attacked model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from dverge_serve.engine.outputs import Scores, softmax
from verification.attacks.attack import Attack

VERSIONS = ("float", "delivered")
SOFT = "mean-softmax"  # among a report's outcomes: the model's, had softmax been averaged
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


class Scorer(Protocol):
    """What scores images: the engine, or anything that answers like it."""

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]` in `[0,1]`."""


@dataclass(frozen=True)
class Target:
    """A model under attack: what scores it, and its weights where we have them.

    Args:
        engine: scores every image that counts.
        members: for gradients, in evaluation mode; None where there are none.
        weights: a hash of what the gradients come from.
    """

    engine: Scorer
    members: Sequence[nn.Module] | None
    weights: str = ""


@dataclass
class Outcomes:
    """Who survived what, for one target.

    `survived[attack, eps, version]` is bool `[n]`: every restart's answer was still the label.
    `ran[attack, eps]` is bool `[n]`: images the attack was run on; the others had fallen before.
    `invalid` marks images with an output that was not finite at any time.
    `soft` is `survived` by the mean of softmax, had the members been combined so.
    `worst[eps, threat]` are 8-bit images: the first delivered one that broke, else the last tried.
    """

    survived: dict[tuple[str, float, str], Mask]
    clean: Mask
    invalid: Mask
    ran: dict[tuple[str, float], Mask] = field(default_factory=dict)
    queries: dict[tuple[str, float], npt.NDArray[np.int64]] = field(default_factory=dict)
    worst: dict[tuple[float, str], Pixels] = field(default_factory=dict)
    broken: dict[tuple[float, str], Mask] = field(default_factory=dict)  # of `worst`
    soft: dict[tuple[str, float, str], Mask] = field(default_factory=dict)
    soft_clean: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))
    outside: int = 0  # adversarial images outside their ball or box: a bug of the harness
    scored: int = 0

    def has(self, attack: Attack, eps: float) -> bool:
        """Return whether the attack was run at this radius."""
        return (attack.name, eps, VERSIONS[0]) in self.survived

    def robust(
        self, attacks: Sequence[Attack], eps: float, versions: Sequence[str] = VERSIONS
    ) -> Mask:
        """Return which images are right when clean and survive all these attacks, `[n]`.

        Attacks that were not run at this radius break nothing.
        """
        robust = self.clean & ~self.invalid
        for attack in attacks:
            if self.has(attack, eps):
                for version in versions:
                    robust = robust & self.survived[attack.name, eps, version]
        return robust

    def by_softmax(self) -> Outcomes:
        """Return the outcomes had the members' softmax outputs been averaged, not their logits."""
        return Outcomes(self.soft, self.soft_clean, self.invalid, self.ran)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Outcomes:
        """Read `to_json`'s form: the masks, and which attacks were run on which images."""
        outcome = cls({}, _mask(table["clean"]), _mask(table["invalid"]))
        for entry in table["survived"]:
            key = (entry["attack"], entry["eps"])
            outcome.survived[*key, entry["version"]] = _mask(entry["images"], "1-")
            outcome.ran[key] = _mask(entry["images"], "01")
        return outcome

    def to_json(self) -> dict[str, Any]:
        """Return the per-image matrix: one character an image, in test order.

        1 right, 0 wrong, - not run (it had already fallen to another attack).
        """
        return {
            "clean": line(self.clean),
            "invalid": line(self.invalid),
            "survived": [
                {
                    "attack": attack,
                    "eps": eps,
                    "version": version,
                    "images": line(mask, self.ran[attack, eps]),
                }
                for (attack, eps, version), mask in self.survived.items()
            ],
        }


def soft_answers(scores: Scores) -> npt.NDArray[np.int64]:
    """Return the answers had the members' softmax outputs been averaged, `[n]`."""
    members = scores.member_logits
    known = np.where(np.isfinite(members), members, 0)  # the gate `finite` tells the others
    return np.asarray(softmax(known).mean(axis=1).argmax(axis=-1))


def _mask(text: str, true: str = "1") -> Mask:
    return np.array([each in true for each in text], dtype=bool)


def line(mask: Mask, ran: Mask | None = None) -> str:
    """Return one character for each image."""
    told = np.where(mask, "1", "0")
    return "".join(told if ran is None else np.where(ran, told, "-"))
