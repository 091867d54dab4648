"""What each step of DVERGE draws: the layer that is distilled, and who learns from whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.config import Config
from training.models.member import Member
from training.seeds import generator


def layer_of(config: Config, members: Sequence[Member], epoch: int, number: int) -> int:
    """Return the layer that batch `number` of an epoch distils, of the deepest member's layers."""
    when = (epoch,) if config.dverge.layer_every == "epoch" else (epoch, number)
    return draw_layer(config, max(member.depth for member in members), *when)


def draw_layer(config: Config, depth: int, *when: int | str) -> int:
    """Return a layer drawn uniformly from 1..depth, the same for all members."""
    draw = generator(config.seed, "layer", *when)
    return int(torch.randint(1, depth + 1, (1,), generator=draw))


def all_others(members: int) -> list[list[int]]:
    """Return for each of `members` members the indices of all the others, as in equation 3."""
    return [[other for other in range(members) if other != index] for index in range(members)]


def draw_partners(config: Config, *when: int | str) -> list[list[int]]:
    """Return for each member the others whose images it learns from in a step.

    With `partners` of them, members stand in a random circle, and each learns from those that
    stand at the same distances from it. These are derangements: no member learns from itself, and
    every member's images are used equally often. All pairs are equally likely, so the expected
    loss is that of equation 3, at a cost that grows with the members and not with their square.
    """
    count, drawn = config.members, config.dverge.partners_of(config.members)
    if drawn == count - 1:
        return all_others(count)
    draw = generator(config.seed, "partners", *when)
    circle = torch.randperm(count, generator=draw).tolist()
    distances = (1 + torch.randperm(count - 1, generator=draw)[:drawn]).tolist()
    places = [circle.index(member) for member in range(count)]
    return [[circle[(place + far) % count] for far in distances] for place in places]
