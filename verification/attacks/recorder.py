"""Scoring adversarial images on one target, and recording the outcome of each image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dverge_serve.engine.outputs import Scores
from dverge_serve.images import to_float
from training.data.splits import Split
from verification.attacks.attack import Attack
from verification.attacks.outcomes import VERSIONS, Mask, Outcomes, Pixels, soft_answers
from verification.attacks.perturbation import count_norm_violations, decode_fp16, quantize_uint8
from verification.attacks.target import Scorer

Deltas = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Scored:
    """One attack's images at one radius, and which of them the target answered wrongly.

    Args:
        deltas: the float images' changes, float16 `[n, C, H, W]`.
        quantized: the images in 8 bits, uint8 `[n, C, H, W]`.
        broken: bool `[n]` each, as floats and in 8 bits.
    """

    deltas: Deltas
    quantized: Pixels
    broken: tuple[Mask, Mask]

    def after(self, before: Scored | None) -> Scored:
        """Return, of each image and version, the first that broke, else the last tried."""
        if before is None:
            return self
        deltas, quantized = self.deltas.copy(), self.quantized.copy()
        as_float, as_8bit = before.broken
        deltas[as_float], quantized[as_8bit] = before.deltas[as_float], before.quantized[as_8bit]
        return Scored(deltas, quantized, (as_float | self.broken[0], as_8bit | self.broken[1]))


class OutcomeRecorder:
    """The outcomes of one target, filled in attack by attack.

    Args:
        engine: scores the images; the clean ones at once.
        split: clean images and labels.
    """

    def __init__(self, engine: Scorer, split: Split) -> None:
        self._engine = engine
        self._images = split.images.cpu().numpy()
        self._labels = split.labels.cpu().numpy()
        scores = engine.run_all(to_float(self._images))
        self._of_none = Scores(scores.logits[:0], scores.member_logits[:0])
        finite: Mask = np.asarray(np.isfinite(scores.logits).all(axis=1))
        self.outcomes = Outcomes(
            {},
            np.asarray(scores.predictions == self._labels),
            ~finite,
            soft_clean=np.asarray(soft_answers(scores) == self._labels),
        )

    def score(self, attack: Attack, eps: float, deltas: Deltas, ran: Mask) -> Scored:
        """Score the adversarial images, as floats and in 8 bits, and record the outcome.

        Args:
            attack: that made them.
            eps: its radius.
            deltas: the images' changes, float16 `[n, C, H, W]`.
            ran: bool `[n]`: images the attack was run on.
        """
        floats = decode_fp16(self._images, deltas)
        quantized = quantize_uint8(floats, self._images, eps, attack.norm)
        self.outcomes.violations += count_norm_violations(
            floats, quantized, self._images, eps, attack.norm
        )
        self.outcomes.scored += int(ran.sum())
        return Scored(deltas, quantized, self.record(attack, eps, floats, quantized, ran))

    def record(
        self,
        attack: Attack,
        eps: float,
        floats: npt.NDArray[np.float32],
        quantized: Pixels,
        ran: Mask,
    ) -> tuple[Mask, Mask]:
        """Score both versions of the images that the attack was run on, and record the outcome.

        Returns:
            which were answered wrongly, as floats and in 8 bits, bool `[n]`.
        """
        broken = []
        for version, pixels in zip(VERSIONS, (floats[ran], to_float(quantized[ran])), strict=True):
            scores = self._engine.run_all(pixels) if ran.any() else self._of_none
            key = (attack.name, eps, version)
            broken.append(self.outcomes.add(key, scores, self._labels, ran))
            self.outcomes.keep_margin(eps, attack.threat, scores, self._labels, ran)
        self.outcomes.keep_worst(eps, attack.threat, quantized, broken[1], ran)
        return broken[0], broken[1]
