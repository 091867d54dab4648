"""Vulnerability diversity of the members: the metric of the DVERGE paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.splits import Split, to_float
from training.methods.dverge import distill_all
from training.models.member import Member
from training.parallel.threads import side_by_side
from training.schedules import Dverge
from training.seeds import generator

BATCH = 256
LAYERS = 3  # drawn for the expectation over layers


def diversity(members: Sequence[Member], split: Split, settings: Dverge, seed: int) -> Any:
    """Return the paper's diversity of every pair of members (section 3.1, eq. 2).

    `d(i, j) = 1/2 E[CE(f_i(x'_{f_j,l}), y_t) + CE(f_j(x'_{f_i,l}), y_t)]`, where `x'` is a source
    image distilled to look like a target image: high where members share no weakness.

    Args:
        members: in evaluation mode, on the split's device.
        split: images; sources are paired with targets drawn at random.
        settings: of the distillation; BatchNorm statistics stand still.
        seed: of the pairing and the layers.

    Returns:
        a symmetric matrix in nats with nulls on the diagonal, and the layers it is a mean over.
    """
    still = replace(settings, batchnorm="running")
    draw = generator(seed, "diversity")
    deepest = max(member.depth for member in members)
    layers = sorted((torch.randperm(deepest, generator=draw)[:LAYERS] + 1).tolist())
    target = split.take(torch.randperm(len(split), generator=draw).to(split.labels.device))
    losses: dict[tuple[int, int], list[Tensor]] = {}
    for layer in layers:
        for source, other in zip(_parts(split), _parts(target), strict=True):
            distilled = distill_all(
                members,
                to_float(source.images),
                to_float(other.images),
                layer=layer,
                settings=still,
            )

            @torch.no_grad()
            def loss(
                pair: tuple[int, int], made: list[Tensor] = distilled, labels: Tensor = other.labels
            ) -> Tensor:
                return F.cross_entropy(members[pair[0]](made[pair[1]]), labels, reduction="none")

            pairs = list(permutations(range(len(members)), 2))
            for pair, found in zip(pairs, side_by_side(loss, pairs, split.device), strict=True):
                losses.setdefault(pair, []).append(found)
    matrix: list[list[float | None]] = [[None] * len(members) for _ in members]
    for i, j in combinations(range(len(members)), 2):
        both = torch.cat(losses[i, j] + losses[j, i]).double().mean()
        matrix[i][j] = matrix[j][i] = float(both)
    return {"layers": layers, "eps": settings.eps, "images": len(split), "nats": matrix}


def _parts(split: Split) -> list[Split]:
    return [split.take(slice(at, at + BATCH)) for at in range(0, len(split), BATCH)]
