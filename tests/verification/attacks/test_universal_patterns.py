"""Universal patterns: the family, and weaknesses along a fixed direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.verification.models import EPS, Linear, TorchEngine, linear_split
from training.data.splits import to_float
from verification.attacks.perturbation import uint8_steps
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.attacks.universal_patterns import (
    KEPT,
    TRIED_ON,
    UniversalPatterns,
    most_breaking,
    patterns,
)

ATTACK = UniversalPatterns(name="universal patterns")


def waves(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Patterns of people: a checkerboard, stripes, a half, a constant."""
    _, height, width = shape
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = {
        "checkerboard": row + column,
        "rows of 1": row,
        "columns of 2": column // 2,
        "rows of 4": row // 4,
        "diagonals of 3": ((row + column) % 3 > 0).long(),
        "halves": (column >= width / 2).long(),
        "brightness": torch.zeros_like(row),
    }
    return {name: (1 - 2 * (cell % 2)).expand(shape) for name, cell in cells.items()}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12)])
def test_the_family_has_each_pattern_once_and_its_opposite(shape: tuple[int, int, int]) -> None:
    every = patterns(*shape)
    assert set(every.flatten().tolist()) == {-1, 1}
    assert every.shape[1:] == torch.Size(shape)
    seen = {tuple(each.flatten().tolist()) for each in every}
    assert len(seen) == len(every)
    assert {tuple(-value for value in each) for each in seen} == seen
    assert {tuple(wave.flatten().tolist()) for wave in waves(shape).values()} <= seen


def test_the_family_is_small() -> None:
    assert len(patterns(1, 8, 8)) == 232
    assert len(patterns(3, 64, 64)) == 364
    red = torch.tensor([1, -1, -1])[:, None, None].expand(3, 64, 64)
    assert any(torch.equal(red, each) for each in patterns(3, 64, 64).int())


class Step(nn.Module):
    """Always class 0, except where a direction is stronger than half of what eps allows.

    No gradient and no score shows the direction before.
    """

    def __init__(self, direction: Tensor, eps: float) -> None:
        super().__init__()
        self.direction, self.limit, self.asked = direction.float(), eps / 2, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        over = ((x - 0.5) * self.direction).mean((1, 2, 3)) > self.limit
        return torch.stack([1 - over.float(), over.float()], 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12)])
def test_a_weakness_along_a_pattern_of_either_sign_is_found(shape: tuple[int, int, int]) -> None:
    x, labels = torch.full((50, *shape), 0.5), torch.zeros(50, dtype=torch.long)
    for name, wave in waves(shape).items():
        for direction in (wave, -wave):
            model = Step(direction, EPS)
            made = ATTACK(model, x, labels, EPS)
            assert (model(made).argmax(1) == 1).all(), name


class Several(nn.Module):
    """A step along one of several directions for each image: that of its corner pixel."""

    def __init__(self, directions: list[Tensor], eps: float) -> None:
        super().__init__()
        self.steps = [Step(direction, eps) for direction in directions]

    def forward(self, x: Tensor) -> Tensor:
        kind = ((x[:, 0, 0, 0] - 0.4) / 0.05).round().long()
        over = torch.stack([step(x)[:, 1] for step in self.steps], 1)
        found = over.gather(1, kind[:, None])[:, 0]
        return torch.stack([1 - found, found], 1)


def test_images_broken_by_different_patterns_are_all_broken() -> None:
    eps, labels = 4 / 255, torch.zeros(60, dtype=torch.long)
    model = Several(list(waves((1, 8, 8)).values())[:KEPT], eps)
    x = torch.full((60, 1, 8, 8), 0.5)
    x[:, 0, 0, 0] = 0.4 + 0.05 * (torch.arange(60) % KEPT)  # eps turns no pixel into the next
    assert (model(x).argmax(1) == 0).all()
    assert (model(ATTACK(model, x, labels, eps)).argmax(1) == 1).all()


@pytest.mark.parametrize("size", [4 / 255, 0.05, 0.15])
def test_every_image_is_a_corner_of_the_ball_in_8_bits(size: float) -> None:
    split = linear_split(list(range(0, 256, 5)))
    x = to_float(split.images)
    made = ATTACK(Linear(), x, split.labels, size)
    steps = (made * 255 - split.images).round()
    assert torch.allclose(made * 255, (made * 255).round(), atol=1e-4)
    inside = (made > 0) & (made < 1)
    assert (steps[inside].abs() == uint8_steps(size)).all()
    assert steps.abs().max() <= uint8_steps(size)


def test_in_l2_a_pattern_has_the_length_of_the_radius() -> None:
    x, labels = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.long)
    attack = UniversalPatterns(name="universal patterns", norm="l2")
    made = attack(Linear(), x, labels, 0.4)
    assert torch.allclose((made - x).square().sum((1, 2, 3)).sqrt(), torch.tensor(0.4))


def test_few_answers_are_asked_however_many_images() -> None:
    model = Step(waves((1, 8, 8))["checkerboard"], EPS)
    x, labels = torch.full((300, 1, 8, 8), 0.5), torch.zeros(300, dtype=torch.long)
    ATTACK.run(model, x, labels, EPS, 0)
    assert model.asked == len(patterns(1, 8, 8)) * TRIED_ON + 300


def test_each_pattern_is_chosen_for_what_the_ones_before_left() -> None:
    rows = ("11100", "11000", "00110", "00000")
    broken = torch.tensor([[each == "1" for each in row] for row in rows])
    assert most_breaking(broken, 4) == [0, 2]
    assert most_breaking(broken, 1) == [0]
    assert most_breaking(torch.zeros(3, 5, dtype=torch.bool), 4) == [0]


def test_every_model_meets_the_patterns_that_are_worst_for_it() -> None:
    ways = dict(zip(("model", "control", "against"), waves((1, 8, 8)).values(), strict=False))
    targets = {name: Target(TorchEngine([Step(way, EPS)]), None) for name, way in ways.items()}
    split = linear_split([120, 121])
    split.labels[:] = 0
    kept: list[str] = []
    found = run_suite(
        [ATTACK], {}, targets, split, [EPS], seed=0, keep=lambda name, *_: kept.append(name)
    )
    assert ATTACK.threat == "transfer"
    assert kept == [ATTACK.name]
    for outcome in found.values():
        assert outcome.clean.all()
        assert not outcome.robust([ATTACK], EPS).any()
        assert outcome.violations == 0


def test_a_pattern_that_breaks_none_is_not_tried_at_a_smaller_radius() -> None:
    model = Step(waves((1, 8, 8))["checkerboard"], EPS)
    x, labels = torch.full((300, 1, 8, 8), 0.5), torch.zeros(300, dtype=torch.long)
    small, large = ATTACK.run_radii(model, x, labels, [0.6 * EPS, EPS], 0)
    assert model.asked == (len(patterns(1, 8, 8)) + 1) * TRIED_ON + 2 * 300
    for made, eps in ((small, 0.6 * EPS), (large, EPS)):
        assert (model(made.images).argmax(1) == 1).all()
        assert (made.images - x).abs().max() <= eps + 1e-6
