"""Attacks by labels alone: exact counts, the ball, neighbours, and nearness to the boundary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.verification.models import Linear, linear_split
from training.data.splits import Split, to_float
from training.pgd import Norm
from verification.attacks.hop_skip_jump import HopSkipJump
from verification.attacks.label_search import LabelAttack
from verification.attacks.rays import RayS

RAYS = RayS(name="rays", queries=400)
HOPS = [HopSkipJump(name="hops", queries=2000, norm=norm) for norm in ("linf", "l2")]
WHERE = {"linf": 1.0, "l2": 8.0}  # the length of a change by 1 of all 64 pixels
ATTACKS = pytest.mark.parametrize("attack", [RAYS, *HOPS], ids=["rays", "hops-linf", "hops-l2"])
VALUES = [120, 135, 200, 20]  # 7.5 steps from the line, 7.5, 72.5 and 107.5


class Labels:
    """A linear model that tells labels, and counts who asks."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        answers: Tensor = Linear()(images).argmax(1)
        return answers


def found(attack: LabelAttack, split: Split, radii: list[float], seed: int = 0) -> list[Tensor]:
    made = attack.run_radii(Labels(), to_float(split.images), split.labels, radii, seed)
    return [each.images for each in made]


@ATTACKS
def test_it_comes_near_the_boundary_and_counts_every_query(attack: LabelAttack) -> None:
    split, model, scale = linear_split(VALUES), Labels(), WHERE[attack.norm]
    x = to_float(split.images)
    radii = [scale * steps / 255 for steps in (7, 9, 80)]
    made = attack.run_radii(model, x, split.labels, radii, 0)
    wrong = [(Linear()(each.images).argmax(1) != split.labels).tolist() for each in made]
    assert wrong == [[False] * 4, [True, True, False, False], [True, True, True, False]]
    for radius, each in zip(radii, made, strict=True):
        change = (each.images - x).flatten(1)
        size = change.abs().amax(1) if attack.norm == "linf" else change.norm(dim=1)
        assert float(size.max()) <= radius + 1e-6
        assert 0 <= float(each.images.min()) <= float(each.images.max()) <= 1
        assert torch.equal(each.images[3], x[3])  # what nothing broke stays as it is
        assert each.queries is not None
        assert each.queries[3] == attack.queries
    # The smallest radius stands to the end, and all that was asked is its.
    assert made[0].queries is not None
    assert model.asked == made[0].queries.sum() == 4 * attack.queries


@ATTACKS
def test_an_image_that_is_broken_leaves(attack: LabelAttack) -> None:
    split, model = linear_split(VALUES), Labels()
    radius = 12 / 255 * WHERE[attack.norm]
    (made,) = attack.run_radii(model, to_float(split.images), split.labels, [radius], 0)
    assert made.queries is not None
    assert model.asked == made.queries.sum()
    assert made.queries[:2].max() < attack.queries
    assert made.queries[2:].tolist() == [attack.queries] * 2


@ATTACKS
def test_neighbours_and_batches_change_nothing(attack: LabelAttack) -> None:
    radii = [12 / 255 * WHERE[attack.norm]]
    (together,) = found(attack, linear_split(VALUES), radii)
    (alone,) = found(attack, linear_split(VALUES[:1]), radii)
    assert torch.equal(together[:1], alone)
    assert torch.equal(together, found(attack, linear_split(VALUES), radii)[0])


@ATTACKS
@pytest.mark.parametrize("queries", [0, 1, 13])
def test_a_budget_is_kept_to_the_query(attack: LabelAttack, queries: int) -> None:
    split, model = linear_split(VALUES), Labels()
    (made,) = replace(attack, queries=queries).run_radii(
        model, to_float(split.images), split.labels, [1e-3], 0
    )
    assert made.queries is not None
    assert made.queries.tolist() == [queries] * 4
    assert model.asked == 4 * queries


def test_no_image_is_no_query() -> None:
    model, split = Labels(), linear_split(VALUES).take(slice(0, 0))
    for each in RAYS.run_radii(model, to_float(split.images), split.labels, [0.1, 0.2], 0):
        assert each.images.shape == (0, 1, 8, 8)
        assert each.queries is not None
        assert not len(each.queries)
    assert model.asked == 0


def test_hop_skip_jump_draws_by_its_seed() -> None:
    split, radii = linear_split(VALUES), [12 / 255]
    one, other = (found(HOPS[0], split, radii, seed)[0] for seed in (1, 2))
    assert not torch.equal(one, other)


class Plane:
    """Label 1 on one side of a plane through grey, and a record of what it was asked, in order."""

    def __init__(self, size: int) -> None:
        draw = np.random.default_rng(3)
        self.normal = draw.choice([-1.0, 1.0], (3, size, size))
        near = draw.uniform(0.3, 0.7, self.normal.shape)
        off = (self.normal * (near - 0.5)).mean() + 0.005
        self.image = torch.from_numpy((near - off * self.normal)[None]).float()
        self.asked: list[Tensor] = []
        self.told: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(images)
        side = ((images.double() - 0.5) * torch.from_numpy(self.normal)).sum((1, 2, 3))
        self.told.append((side > 0).long())
        return self.told[-1]

    def record(self, norm: Norm, queries: int) -> None:
        attack = HopSkipJump(name="hops", queries=queries, norm=norm)
        attack.run_radii(self, self.image, torch.tensor([0]), [1e-6], 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jumps_probes_find_the_normal_of_larger_images(norm: Norm) -> None:
    model = Plane(32)
    model.record(norm, 600)
    asked, along = model.asked, []
    for at in range(1, len(asked)):
        if len(asked[at]) == 1 < len(asked[at - 1]):  # a step along the direction just estimated
            probes = [each for each in asked[at - 4 : at] if len(each) > 1]
            direction = asked[at][0].double() - torch.cat(probes).double().mean(0)
            along.append(float((direction.numpy() * model.normal).mean() / direction.std()))
    # 100 probes in 3,072 dimensions: 0.14 (L2) and 0.11 (Linf) are expected, 0.02 is chance.
    assert len(along) == 3
    assert min(along) > 0.07


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jumps_search_for_the_boundary_ends_on_large_images(norm: Norm) -> None:
    model = Plane(224)
    model.record(norm, 80)
    sizes = [len(each) for each in model.asked]
    assert max(sizes) > 1  # it came to the probes
    first = [int(each[0]) for each in model.told].index(1)
    assert sizes.index(max(sizes)) - first - 1 <= 25
