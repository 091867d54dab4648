"""PGN, MEF and BSR: their equations written out again, on losses of known gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dverge_serve.errors import UserError
from tests.verification.models import Linear
from training import pgd
from verification.attacks.block_shuffle import block_shuffled, shuffle_blocks
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.neighbourhood import flatness_enhanced, norm_penalised

SHAPE = (3, 1, 4, 4)
EPS = 0.1


def images(seed: int = 0) -> Tensor:
    return torch.rand(SHAPE, generator=generator(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cubes(x: Tensor) -> Tensor:
    """A loss whose gradient at x is 3 x^2."""
    return x.pow(3).flatten(1).sum(1)


def noise(draw: torch.Generator, reach: float) -> Tensor:
    return (2 * torch.rand(SHAPE, generator=draw, dtype=torch.float64) - 1) * reach * EPS


def unit(g: Tensor) -> Tensor:
    return g / g.abs().flatten(1).mean(1).view(-1, 1, 1, 1)


def test_pgn_mixes_the_gradients_of_each_neighbour_and_of_a_step_down_from_it() -> None:
    x, draw = images(), generator()
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(3):
        near = x + noise(draw, 3.0)
        g1 = 3 * near**2
        g2 = 3 * (near - 0.02 * unit(g1)) ** 2
        expected += (0.7 * g1 + 0.3 * g2) / 3
    estimate = norm_penalised(EPS, generator(), step_size=0.02, samples=3, balance=0.3)
    torch.testing.assert_close(estimate(cubes, x), expected)


def test_pgn_descends_the_norm_of_the_gradient() -> None:
    # Without noise it is g - balance * step * H g / mean|g|, to first order.
    x, step = images(), 1e-5
    estimate = norm_penalised(0.0, generator(), step_size=step, samples=1, balance=1.0)
    g = 3 * x**2
    expected = g - step * 6 * x * unit(g)
    torch.testing.assert_close(estimate(cubes, x), expected, rtol=0, atol=1e-8)


def test_mef_moves_each_neighbour_along_its_own_gradients_of_the_steps_before() -> None:
    draw, memory = generator(), [torch.zeros(SHAPE, dtype=torch.float64) for _ in range(2)]
    estimate = flatness_enhanced(EPS, generator(), samples=2)
    for step in range(3):
        x = images(step)
        expected = torch.zeros(SHAPE, dtype=torch.float64)
        for k in range(2):
            g = 3 * (x + noise(draw, 2.0) + 0.15 * EPS * memory[k]) ** 2
            memory[k] = unit(g) - 0.9 * memory[k]
            expected += g / 2
        torch.testing.assert_close(estimate(cubes, x), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_loss_is_the_same_everywhere(norm: pgd.Norm) -> None:
    w = images(5) - 0.5
    for estimate in (
        norm_penalised(EPS, generator(), step_size=0.1, samples=2, norm=norm),
        flatness_enhanced(EPS, generator(), samples=2, norm=norm),
    ):
        for _ in range(2):
            found = estimate(lambda x: (x * w).flatten(1).sum(1), images())
            torch.testing.assert_close(found, w)


def test_a_zero_gradient_stays_zero() -> None:
    nothing = lambda x: (0 * x).flatten(1).sum(1)  # noqa: E731
    for estimate in (
        norm_penalised(EPS, generator(), step_size=0.1, samples=2),
        flatness_enhanced(EPS, generator(), samples=2),
    ):
        assert not estimate(nothing, images()).any()


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_without_rotation_are_the_pixels_in_another_place(blocks: int) -> None:
    x = torch.arange(2 * 3 * 7 * 5, dtype=torch.float64).view(2, 3, 7, 5)
    orders = set()
    for seed in range(8):
        found = shuffle_blocks(x, generator(seed), blocks, 0.0).round(decimals=9)
        assert found.shape == x.shape
        # The same move for every image and channel.
        move = found[0, 0].flatten()
        assert sorted(move.tolist()) == list(range(35))
        for image in range(2):
            for channel in range(3):
                offset = 35 * (3 * image + channel)
                assert torch.equal(found[image, channel].flatten(), move + offset)
        orders.add(tuple(move.tolist()))
    assert len(orders) == 1 if blocks == 1 else len(orders) > 4


def test_a_strip_turns_around_its_middle_in_pixels_whatever_its_shape() -> None:
    height, width, degrees = 5, 9, 24.0
    x = torch.rand((1, 1, height, width), generator=generator(), dtype=torch.float64)
    found = shuffle_blocks(x, generator(7), 1, degrees)
    draw = generator(7)  # the axis, the place of no cut, then the strip's angle
    torch.randint(2, (), generator=draw)
    torch.rand(1, generator=draw)
    torch.randperm(1, generator=draw)
    angle = math.radians(degrees * (2 * float(torch.rand((), generator=draw)) - 1))
    expected = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            down, right = row - (height - 1) / 2, column - (width - 1) / 2
            y = down * math.cos(angle) + right * math.sin(angle) + (height - 1) / 2
            z = right * math.cos(angle) - down * math.sin(angle) + (width - 1) / 2
            for a in (math.floor(y), math.floor(y) + 1):
                for b in (math.floor(z), math.floor(z) + 1):
                    if 0 <= a < height and 0 <= b < width:
                        weight = (1 - abs(y - a)) * (1 - abs(z - b))
                        expected[row, column] += weight * x[0, 0, a, b]
    torch.testing.assert_close(found[0, 0], expected)


def test_bsr_is_the_mean_gradient_of_its_copies() -> None:
    x, draw = images(), generator()
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(3):
        seen = x.clone().requires_grad_()
        shuffled = shuffle_blocks(seen, draw, 2, 24.0)
        (g,) = torch.autograd.grad(shuffled.pow(3).sum(), seen)
        expected += g / 3
    torch.testing.assert_close(block_shuffled(generator(), copies=3)(cubes, x), expected)


def test_an_attack_averages_in_one_way_and_counts_its_gradients() -> None:
    plain = GradientAttack(name="a", threat="transfer", source="s", steps=4, momentum=1.0)
    kinds = {"variance_samples": 3, "penalty_samples": 4, "flat_samples": 2, "shuffles": 2}
    x, labels = torch.rand(3, 1, 8, 8, generator=generator()), torch.tensor([0, 1, 0])
    for name, a_step in kinds.items():
        attack = replace(plain, **{name: 2})  # type: ignore[arg-type]
        model = Linear()
        passes: list[int] = []
        model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        found = attack.run(model, x, labels, EPS, 0).images
        assert len(passes) == attack.work == 4 * a_step
        assert float((found - x).abs().max()) <= EPS + 1e-6
        assert torch.equal(found, attack.run(model, x, labels, EPS, 0).images)
    with pytest.raises(UserError, match="has flat_samples and shuffles; expected one of them"):
        replace(plain, flat_samples=1, shuffles=1)
