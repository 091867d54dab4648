"""The paper's transferability matrix: how often one member's adversarial images fool another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training import pgd
from training.data.splits import Split, to_float
from training.models.member import Member
from training.seeds import generator
from verification.attacks.batches import in_batches

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

    def right(part: Split, start: int) -> Tensor:
        with torch.no_grad():
            answers = pgd.member_logits(members, to_float(part.images)).argmax(-1)
        return (answers == part.labels).all(0)

    chosen = split.take(torch.cat(in_batches(right, split)).nonzero()[:, 0])
    rows = []
    for index, source in enumerate(members):

        def fooled(part: Split, start: int, index: int = index, source: Member = source) -> Tensor:
            x0 = to_float(part.images)
            draw = generator(seed, "transferability", index, start, device=x0.device)
            adversarial = pgd.pgd_loop(
                pgd.cross_entropy(source, part.labels),
                x0,
                eps=eps,
                step_size=eps / 5,
                steps=STEPS,
                rule=pgd.momentum_rule(1.0),
                start=pgd.random_start(x0, eps, draw),
            )
            with torch.no_grad():
                stack = pgd.member_logits(members, adversarial)
            answers = torch.cat([stack, stack.mean(0, keepdim=True)]).argmax(-1)
            return answers != part.labels

        found = in_batches(fooled, chosen)
        rows.append(torch.cat(found, 1).double().mean(1).tolist() if found else [])
    return {"eps": eps, "steps": STEPS, "images": len(chosen), "success": rows}
