"""The independent reference: AutoAttack as published, from the optional package pyautoattack."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.attacks import Norm, mean_logits_output

NORMS = {"linf": "Linf", "l2": "L2"}


def available() -> bool:
    """Return whether the extra `audit` is installed."""
    return importlib.util.find_spec("pyautoattack") is not None


def autoattack(
    members: Sequence[nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    seed: int,
) -> Tensor:
    """Return AutoAttack's images (APGD-CE, APGD-T, FAB-T, Square) on the members' mean logits.

    With fewer than four classes its targeted attacks cannot run; APGD-CE and Square remain. The
    package seeds torch's global generators; they are put back.

    Args:
        members: in evaluation mode.
        images: float32 `[N, C, H, W]` in `[0,1]`.
        labels: `[N]`.
        eps: radius.
        norm: of the ball.
        seed: of all its attacks.
    """
    from pyautoattack import AutoAttack

    logger = logging.getLogger("auto-attack")
    before, device = logger.level, images.device
    logger.setLevel(logging.ERROR)  # its warnings are gates of ours
    model = _Ensemble(members)
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    targeted = classes > 3
    chosen = {} if targeted else {"version": "custom", "attacks": ["apgd-ce", "square"]}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            suite = AutoAttack(
                model, norm=NORMS[norm], eps=eps, seed=seed % 2**32, device=device, **chosen
            )
            if targeted:
                suite.apgd_targeted.n_target_classes = min(9, classes - 1)
                suite.fab.n_target_classes = min(9, classes - 1)
            found = suite.run_standard_evaluation(images, labels)
        finally:
            logger.setLevel(before)
    best: Tensor = found[0] if isinstance(found, tuple) else found
    return best.detach()


class _Ensemble(nn.Module):
    """The mean of the members' logits as one module, which is what the package attacks."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        return mean_logits_output(list(self.members))(images)
