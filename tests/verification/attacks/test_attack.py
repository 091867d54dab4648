"""The parts of gradient attacks: closed forms on linear models, and properties."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training import pgd
from training.models.ensemble import Ensemble
from training.models.member import Member as Network
from training.models.resnet import resnet_stages
from verification.attacks import losses, neighbourhood, transforms
from verification.attacks.skip_gradient import residual_ends, skip_gradient

SHAPE = (3, 1, 4, 4)
LABELS = torch.tensor([0, 1, 2])


class Linear(nn.Module):
    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((classes, 16), generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def images(seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(SHAPE, generator=draw, dtype=torch.float64)


def direction(seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=draw, dtype=torch.float64)


def along(w: Tensor) -> pgd.Loss:
    return lambda x: (x * w).flatten(1).sum(1)


def lengths(delta: Tensor) -> Tensor:
    return delta.square().sum((1, 2, 3)).sqrt()


def test_fgsm_is_one_whole_step_to_the_corner() -> None:
    x0, w = images(), direction()
    found = pgd.pgd_loop(along(w), x0, eps=0.1, step_size=0.1, steps=1)
    torch.testing.assert_close(found, (x0 + 0.1 * w.sign()).clamp(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [None, pgd.momentum_rule(1.0, "l2")])
def test_on_a_linear_loss_l2_ends_where_the_gradient_leaves_the_ball(
    rule: pgd.StepRule | None,
) -> None:
    x0, w = images(low=0.4, high=0.6), direction()
    found = pgd.pgd_loop(along(w), x0, eps=0.3, step_size=0.1, steps=5, rule=rule, norm="l2")
    expected = x0 + 0.3 * w / lengths(w).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(eps=st.floats(0.01, 4.0), seed=st.integers(0, 2**32), norm=st.sampled_from(["linf", "l2"]))
def test_starts_and_projections_lie_in_ball_and_box(eps: float, seed: int, norm: pgd.Norm) -> None:
    x0 = images(seed).mul(1.4).sub(0.2).clamp(0, 1)
    far = x0 + 3 * direction(seed + 1)
    draw = torch.Generator().manual_seed(seed)
    for found in (pgd.project(far, x0, eps, norm), pgd.random_start(x0, eps, draw, norm)):
        size = lengths(found - x0) if norm == "l2" else (found - x0).flatten(1).abs().amax(1)
        assert float(size.max()) <= eps + 1e-9
        assert float(found.min()) >= 0
        assert float(found.max()) <= 1
        torch.testing.assert_close(pgd.project(found, x0, eps, norm), found, rtol=0, atol=1e-9)


def test_l2_starts_fill_the_ball_evenly() -> None:
    x0 = torch.full((4000, 1, 1, 2), 0.5)
    found = pgd.random_start(x0, 0.4, torch.Generator().manual_seed(0), "l2")
    inside = (lengths(found - x0) < 0.2).double().mean()  # half the radius: a quarter of the disc
    assert abs(float(inside) - 0.25) < 0.03


def test_dlr_is_the_ratio_and_no_scale_hides_it() -> None:
    scores = torch.tensor([[2.0, 5.0, 1.0, 0.0], [9.0, 4.0, 6.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([1, 1])
    for scale in (1.0, 1e3, 1e-3):
        found = losses.dlr(lambda x, s=scale: scores * s, labels)(images())  # type: ignore[misc]
        assert found.tolist() == pytest.approx([(2 - 5) / (5 - 1), (9 - 4) / (9 - 4)])


def test_dlr_climbs_from_the_right_class_to_the_best_wrong_one() -> None:
    model, x0 = Linear(), images()
    top = model(x0).argmax(1)
    gradient = pgd.gradient(losses.dlr(model, top), x0)
    margin = pgd.gradient(losses.cw_margin(model, top), x0)
    assert bool(((gradient * margin).flatten(1).sum(1) > 0).all())


def test_logsumexp_is_the_log_of_the_mean_exponential() -> None:
    members, x0 = [Linear(seed=0), Linear(seed=1)], images()
    found = losses.logsumexp_output(members)(x0)
    expected = ((members[0](x0).exp() + members[1](x0).exp()) / 2).log()
    torch.testing.assert_close(found, expected)
    loud = [lambda x: torch.full((3, 4), 1e4), lambda x: torch.zeros(3, 4)]
    assert bool(losses.logsumexp_output(loud)(x0).isfinite().all())  # type: ignore[arg-type]


def test_equal_members_are_reweighted_equally_and_the_nearest_most() -> None:
    same = [Linear(seed=0), Linear(seed=0)]
    x0 = images()
    spread = same[0](x0).std(-1)
    expected = losses.cw_margin(same[0], LABELS)(x0) / spread
    torch.testing.assert_close(losses.member_reweighted(same, LABELS)(x0), expected)

    rows = [[1.0, 0.9, -1.0, -1.0], [1.0, -0.5, -1.0, -1.0]]
    scores = [torch.tensor([row], dtype=torch.float64, requires_grad=True) for row in rows]
    fixed: list[Any] = [lambda x, s=each: s for each in scores]
    loss = losses.member_reweighted(fixed, torch.tensor([0]))(torch.zeros(1, 1, 2, 2)).sum()
    found = torch.autograd.grad(loss, scores)
    spreads = [each.detach().std() for each in scores]
    weights = [-float(g[0, 0] * s) for g, s in zip(found, spreads, strict=True)]
    margins = torch.tensor([0.1 / spreads[0], 1.5 / spreads[1]])
    assert weights == pytest.approx((-margins / margins.mean()).softmax(0).tolist())
    assert weights[0] > weights[1]


def test_a_linear_loss_has_no_variance_to_tune() -> None:
    x0, w = images(), direction()
    estimate = neighbourhood.variance_tuned(0.1, torch.Generator().manual_seed(0), samples=3)
    for _ in range(3):
        torch.testing.assert_close(estimate(along(w), x0), w)


def test_variance_tuning_adds_what_the_step_before_saw_around_it() -> None:
    x0 = images()
    loss = lambda x: x.pow(2).flatten(1).sum(1)  # noqa: E731 - its gradient is 2x
    draw, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    estimate = neighbourhood.variance_tuned(0.1, draw, samples=2, reach=1.5)
    torch.testing.assert_close(estimate(loss, x0), 2 * x0)
    noise = [torch.rand(SHAPE, generator=same, dtype=torch.float64) for _ in range(2)]
    variance = sum((2 * (2 * each - 1) * 0.15 for each in noise), torch.zeros(SHAPE)) / 2
    torch.testing.assert_close(estimate(loss, x0 + 0.1), 2 * (x0 + 0.1) + variance)


def test_diverse_inputs_never_with_probability_zero_and_seeded() -> None:
    x0, seen = images(), []

    def loss(x: Tensor) -> Tensor:
        seen.append(x)
        return x.flatten(1).sum(1)

    transforms.diverse_inputs(loss, torch.Generator().manual_seed(0), probability=0.0)(x0)
    assert torch.equal(seen.pop(), x0)
    found = []
    for _ in range(2):
        diverse = transforms.diverse_inputs(loss, torch.Generator().manual_seed(3), probability=1.0)
        found.append([float(diverse(x0)[0]) for _ in range(4)])
    assert found[0] == found[1]
    assert all(each.shape == x0.shape for each in seen)
    # Enlarged images lose only what padding takes: brought back, they never gain brightness.
    assert all(float(each.max()) <= float(x0.max()) + 1e-9 for each in seen)
    assert any(not torch.equal(each, x0) for each in seen)


class Block(nn.Module):
    """A residual block of a linear network, as torchvision names its parts."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, 1, bias=False).double()
        self.conv1.weight.data.fill_(weight)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        passed: Tensor = self.conv1(x)
        return x + passed


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_sgm_scales_residual_branches_and_nothing_else(gamma: float) -> None:
    network, x0 = nn.Sequential(Block(3.0), Block(-2.0)), images()
    loss = lambda x: network(x).flatten(1).sum(1)  # noqa: E731
    before = network(x0)
    with skip_gradient([network], gamma) as branches:
        assert branches == 2
        torch.testing.assert_close(network(x0), before, rtol=0, atol=0)
        found = pgd.gradient(loss, x0)
    torch.testing.assert_close(found, torch.full(SHAPE, (1 + 3 * gamma) * (1 - 2 * gamma)).double())
    torch.testing.assert_close(pgd.gradient(loss, x0), torch.full(SHAPE, -4.0).double())
    assert not any(module._forward_hooks for module in network.modules())


def test_sgm_finds_every_block_of_our_members() -> None:
    member = Network(resnet_stages("resnet14", 1, 2, 3), [0.5], [0.5]).eval()
    assert len(residual_ends([member])) == 6
    x0 = images().float()
    whole = pgd.gradient(pgd.cross_entropy(member, LABELS), x0)
    with skip_gradient([member], 1.0):
        torch.testing.assert_close(pgd.gradient(pgd.cross_entropy(member, LABELS), x0), whole)
    with skip_gradient([member], 0.2):
        assert not torch.allclose(pgd.gradient(pgd.cross_entropy(member, LABELS), x0), whole)


@settings(max_examples=25, deadline=None)
@given(
    eps=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**32),
    loss=st.sampled_from(["dlr", "reweighted", "ce"]),
    form=st.sampled_from([losses.logsumexp_output, Ensemble]),
    variance=st.booleans(),
    diverse=st.booleans(),
    norm=st.sampled_from(["linf", "l2"]),
)
def test_every_new_piece_keeps_ball_box_model_and_seed(
    eps: float,
    seed: int,
    loss: str,
    form: Callable[[Sequence[nn.Module]], pgd.Output],
    variance: bool,
    diverse: bool,
    norm: pgd.Norm,
) -> None:
    members = [Linear(seed=seed), Linear(seed=seed + 1)]
    x0 = images(seed)
    kept = [member.weight.detach().clone() for member in members]

    def attack() -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        output = form(members)
        known = {
            "dlr": losses.dlr(output, LABELS),
            "ce": pgd.cross_entropy(output, LABELS),
            "reweighted": losses.member_reweighted(members, LABELS),
        }
        chosen = known[loss]
        return pgd.pgd_loop(
            transforms.diverse_inputs(chosen, draw) if diverse else chosen,
            x0,
            eps=eps,
            step_size=eps / 3,
            steps=3,
            rule=pgd.momentum_rule(1.0, norm),
            start=pgd.random_start(x0, eps, draw, norm),
            estimate=neighbourhood.variance_tuned(eps, draw, samples=2)
            if variance
            else pgd.gradient,
            norm=norm,
        )

    found = attack()
    size = lengths(found - x0) if norm == "l2" else (found - x0).abs().flatten(1).amax(1)
    assert float(size.max()) <= eps + 1e-9
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(found, attack())
    for member, weight in zip(members, kept, strict=True):
        assert torch.equal(member.weight, weight)
        assert member.weight.grad is None
    assert math.isfinite(float(found.sum()))
