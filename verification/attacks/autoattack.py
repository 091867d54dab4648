"""AutoAttack as published, from the optional package pyautoattack: an independent reference."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dverge_serve.engine.report import NORMS
from training.seeds import derive
from verification.attacks.attack import Attack, Crafted, Model


def available() -> bool:
    """Return whether the extra `audit` is installed."""
    return importlib.util.find_spec("pyautoattack") is not None


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack, kind="autoattack"):
    """APGD-CE, APGD-T, FAB-T and Square (Croce & Hein, 2020) on the members' mean logits.

    With fewer than four classes its targeted attacks cannot run; APGD-CE and Square remain.
    """

    def run(
        self, model: Model, images: Tensor, labels: Tensor, eps: float, *seed: int | str
    ) -> Crafted:
        """Craft one adversarial version of every image; see `Attack.run`.

        The package seeds torch's global generators; they are put back.
        """
        from pyautoattack import AutoAttack as Published

        logger = logging.getLogger("auto-attack")
        before, device = logger.level, images.device
        logger.setLevel(logging.ERROR)  # what it warns of, gates of ours check
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        targeted = classes > 3
        chosen = {} if targeted else {"version": "custom", "attacks": ["apgd-ce", "square"]}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                suite = Published(
                    model,
                    norm=NORMS[self.norm],
                    eps=eps,
                    seed=derive(*seed) % 2**32,
                    device=device,
                    **chosen,
                )
                if targeted:
                    suite.apgd_targeted.n_target_classes = min(9, classes - 1)
                    suite.fab.n_target_classes = min(9, classes - 1)
                found = suite.run_standard_evaluation(images, labels)
            finally:
                logger.setLevel(before)
        best: Tensor = found[0] if isinstance(found, tuple) else found
        return Crafted(best.detach())
