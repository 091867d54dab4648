"""Vulnerability diversity of the members: the metric of the DVERGE paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.splits import Split, to_float
from training.methods.dverge import distill
from training.models.member import Member
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
            for j, member in enumerate(members):
                distilled = distill(
                    member,
                    to_float(source.images),
                    to_float(other.images),
                    layer=member.layer_at(layer, deepest),
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
