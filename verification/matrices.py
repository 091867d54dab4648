"""What the members share: the paper's transferability matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training import attacks as core
from training.data import Split, to_float
from training.members import Member
from training.seeds import generator
from verification.attack import BATCH

STEPS = 10


def transferability(members: Sequence[Member], split: Split, eps: float, seed: int) -> Any:
    """Return how often images made on one member fool another (paper, figure 4).

    Momentum PGD on the cross-entropy of each member, on the images that all members get right.

    Args:
        members: in evaluation mode, on the split's device.
        split: test images.
        eps: Linf radius.
        seed: of the random starts.

    Returns:
        rows are sources, columns targets with the ensemble last; success rates in 0..1.
    """
    right = torch.cat(
        [
            torch.stack([m(to_float(p.images)).argmax(1) == p.labels for m in members]).all(0)
            for p in _parts(split)
        ]
    )
    chosen = split.take(right.nonzero()[:, 0])
    rows = []
    for index, source in enumerate(members):
        fooled = []
        for part in _parts(chosen):
            x0 = to_float(part.images)
            draw = generator(seed, "transferability", index, device=x0.device)
            adversarial = core.ascend(
                core.cross_entropy(source, part.labels),
                x0,
                eps=eps,
                step_size=eps / 5,
                steps=STEPS,
                rule=core.momentum_rule(1.0),
                start=core.random_start(x0, eps, draw),
            )
            with torch.no_grad():
                stack = core.member_logits(members, adversarial)
            answers = torch.cat([stack, stack.mean(0, keepdim=True)]).argmax(-1)
            fooled.append(answers != part.labels)
        rows.append(torch.cat(fooled, 1).double().mean(1).tolist() if fooled else [])
    return {"eps": eps, "steps": STEPS, "images": len(chosen), "success": rows}


def _parts(split: Split) -> list[Split]:
    return [split.take(slice(at, at + BATCH)) for at in range(0, len(split), BATCH)]
