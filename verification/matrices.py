"""What the members share: the paper's transferability and diversity matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training import attacks as core
from training.config import Dverge
from training.data import Split, to_float
from training.dverge import distill
from training.members import Member
from training.seeds import generator
from verification.attack import BATCH

STEPS = 10
LAYERS = 3  # drawn for the expectation over layers


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


def diversity(members: Sequence[Member], split: Split, settings: Dverge, seed: int) -> Any:
    """Return the paper's diversity of every pair of members (section 3.1, eq. 2).

    `d(i, j) = 1/2 E[CE(f_i(x'_{f_j,l}), y_t) + CE(f_j(x'_{f_i,l}), y_t)]`, where `x'` is a source
    image distilled to look like a target image: high where members share no weakness.

    Args:
        members: in evaluation mode, on the split's device.
        split: test images; sources are paired with targets drawn at random.
        settings: of the distillation; BatchNorm statistics stand still.
        seed: of the pairing and the layers.

    Returns:
        a symmetric matrix in nats with nulls on the diagonal, and the layers it is a mean over.
    """
    still = replace(settings, batchnorm="running")
    draw = generator(seed, "diversity")
    depth = members[0].depth
    layers = sorted((torch.randperm(depth, generator=draw)[:LAYERS] + 1).tolist())
    target = split.take(torch.randperm(len(split), generator=draw).to(split.labels.device))
    losses: dict[tuple[int, int], list[Tensor]] = {}
    for layer in layers:
        for source, other in zip(_parts(split), _parts(target), strict=True):
            for j, member in enumerate(members):
                distilled = distill(
                    member,
                    to_float(source.images),
                    to_float(other.images),
                    layer=layer,
                    settings=still,
                )
                with torch.no_grad():
                    for i, each in enumerate(members):
                        found = F.cross_entropy(each(distilled), other.labels, reduction="none")
                        losses.setdefault((i, j), []).append(found)
    matrix: list[list[float | None]] = [[None] * len(members) for _ in members]
    for i, j in combinations(range(len(members)), 2):
        pair = torch.cat(losses[i, j] + losses[j, i]).double().mean()
        matrix[i][j] = matrix[j][i] = float(pair)
    return {"layers": layers, "eps": settings.eps, "images": len(split), "nats": matrix}


def _parts(split: Split) -> list[Split]:
    return [split.take(slice(at, at + BATCH)) for at in range(0, len(split), BATCH)]
