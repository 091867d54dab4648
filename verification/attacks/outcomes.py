"""The outcome of every image under every attack, for one attacked model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dverge_serve.engine.outputs import Scores, softmax
from verification.attacks import losses
from verification.attacks.attack import Attack

VERSIONS = ("float", "delivered")
SOFT = "mean-softmax"  # among a report's outcomes: the model's, had softmax been averaged
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


@dataclass
class Outcomes:
    """Which images survived which attacks, for one target.

    `survived[attack, eps, version]` is bool `[n]`: every restart's answer was still the label.
    `ran[attack, eps]` is bool `[n]`: images the attack was run on; the others were broken before,
    or stood in a larger ball.
    `invalid` marks images with an output that was not finite at any time.
    `soft` is `survived` by the mean of softmax, had the members been combined so.
    `worst[eps, threat]` are 8-bit images: the first that broke the target, else the last tried;
    `broken` says which broke it.
    `queries[attack, eps]` is int64 `[n]`: queries spent on each image, as far as they are counted.
    `margins[eps, threat]` are float `[n]`: the smallest distance to another answer so far, as
    the right logit less the best wrong one.
    """

    survived: dict[tuple[str, float, str], Mask]
    clean: Mask
    invalid: Mask
    ran: dict[tuple[str, float], Mask] = field(default_factory=dict)
    queries: dict[tuple[str, float], npt.NDArray[np.int64]] = field(default_factory=dict)
    worst: dict[tuple[float, str], Pixels] = field(default_factory=dict)
    broken: dict[tuple[float, str], Mask] = field(default_factory=dict)
    margins: dict[tuple[float, str], npt.NDArray[np.float32]] = field(default_factory=dict)
    soft: dict[tuple[str, float, str], Mask] = field(default_factory=dict)
    soft_clean: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))
    violations: int = 0  # adversarial images outside their ball or box: a bug of the attack
    scored: int = 0
    gradients: int = 0  # that attacks computed, each of one network on one image

    def add(
        self, key: tuple[str, float, str], scores: Scores, labels: npt.NDArray[np.int64], ran: Mask
    ) -> Mask:
        """Add the scores of one attack's images.

        Args:
            key: the attack's name, its radius, and the version of the images that was scored.
            scores: of the images the attack was run on.
            labels: of all, `[n]`.
            ran: bool `[n]`: which these are; the others survive.

        Returns:
            which were answered wrongly, bool `[n]`.
        """
        self.invalid[ran] |= ~np.isfinite(scores.logits).all(axis=1)
        wrong = np.zeros_like(ran)
        wrong[ran] = scores.predictions != labels[ran]
        self.survived[key] = ~wrong & self.survived.get(key, np.True_)
        soft = np.ones_like(ran)
        soft[ran] = soft_answers(scores) == labels[ran]
        self.soft[key] = soft & self.soft.get(key, np.True_)
        self.ran[key[:2]] = np.asarray(ran | self.ran.get(key[:2], np.False_))
        return wrong

    def keep_worst(
        self, eps: float, threat: str, quantized: Pixels, wrong: Mask, ran: Mask
    ) -> None:
        """Keep 8-bit images that broke the target, or the last tried, under this threat."""
        key = (eps, threat)
        broken = self.broken.get(key)
        if broken is None:
            self.worst[key], self.broken[key] = quantized.copy(), wrong.copy()
            return
        fresh = ~broken & ran
        self.worst[key][fresh] = quantized[fresh]
        self.broken[key] = broken | wrong

    def keep_margin(
        self, eps: float, threat: str, scores: Scores, labels: npt.NDArray[np.int64], ran: Mask
    ) -> None:
        """Keep how near each image's answer came to another one under this threat; see `add`."""
        logits, wanted = torch.from_numpy(scores.logits), torch.from_numpy(labels[ran])
        margins = self.margins.setdefault((eps, threat), np.full(len(ran), np.inf, np.float32))
        margins[ran] = np.fmin(-losses.margins(logits, wanted).numpy(), margins[ran])

    def nearest(self, standing: Mask, eps: float, threat: str, share: float) -> Mask:
        """Return this share of the standing images, those nearest to another answer, `[n]`."""
        margins = self.margins.get((eps, threat))
        if share >= 1 or margins is None:
            return standing
        order = np.argsort(np.where(standing, margins, np.inf), kind="stable")
        chosen = np.zeros_like(standing)
        chosen[order[: int(np.ceil(share * standing.sum()))]] = True
        return chosen

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

    def unbroken(self, attack: Attack, eps: float) -> Mask:
        """Return which images an attack has left right in some version, `[n]`.

        By the mean of softmax, too: more starts on the others change no figure.
        """
        unbroken = np.zeros_like(self.clean)
        for version in VERSIONS:
            key = (attack.name, eps, version)
            unbroken |= self.survived[key] | self.soft[key]
        return unbroken

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
        for entry in table.get("spent", []):
            key = (entry["attack"], entry["eps"])
            outcome.queries[key] = np.zeros(len(outcome.clean), dtype=np.int64)
            outcome.queries[key][outcome.ran[key]] = entry["queries"]
        return outcome

    def to_json(self) -> dict[str, Any]:
        """Return the per-image matrix: one character an image, in test order.

        1 right, 0 wrong, - not run (another attack had already broken it, it stood in a larger
        ball, or it is not in the sample). `spent` are the queries for each image that an attack was
        run on.
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
            "spent": [
                {"attack": key[0], "eps": key[1], "queries": spent[self.ran[key]].tolist()}
                for key, spent in self.queries.items()
            ],
        }


def soft_answers(scores: Scores) -> npt.NDArray[np.int64]:
    """Return the answers had the members' softmax outputs been averaged, `[n]`."""
    members = scores.member_logits
    known = np.where(np.isfinite(members), members, 0)  # the gate `finite` counts the others
    return np.asarray(softmax(known).mean(axis=1).argmax(axis=-1))


def _mask(text: str, true: str = "1") -> Mask:
    return np.array([each in true for each in text], dtype=bool)


def line(mask: Mask, ran: Mask | None = None) -> str:
    """Return one character for each image."""
    marks = np.where(mask, "1", "0")
    return "".join(marks if ran is None else np.where(ran, marks, "-"))
