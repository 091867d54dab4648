"""The attack core: closed forms on linear models, and what holds of every attack."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training import pgd
from training.models.ensemble import Ensemble
from training.pgd import momentum_rule, pgd_loop, project, random_start
from verification.attacks import losses

SHAPE = (3, 1, 4, 4)


class Linear(nn.Module):
    """Scores that are linear in the pixels: every gradient is known."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn((classes, 16), generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def images(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(SHAPE, generator=draw, dtype=torch.float64)


def direction(seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("decay", [None, 0.0, 1.0])
@pytest.mark.parametrize(("step_size", "steps"), [(0.1, 1), (0.5, 1), (0.03, 4)])
def test_on_a_linear_loss_every_rule_ends_in_the_corner_of_the_ball(
    decay: float | None, step_size: float, steps: int
) -> None:
    x0, w = images(), direction()
    rule = None if decay is None else momentum_rule(decay)
    found = pgd_loop(
        lambda x: (x * w).flatten(1).sum(1),
        x0,
        eps=0.1,
        step_size=step_size,
        steps=steps,
        rule=rule,
    )
    torch.testing.assert_close(found, (x0 + 0.1 * w.sign()).clamp(0, 1), rtol=0, atol=1e-12)


def test_steps_that_do_not_reach_the_ball_add_up() -> None:
    x0, w = images().clamp(0.3, 0.7), direction()
    loss = lambda x: (x * w).flatten(1).sum(1)  # noqa: E731
    found = pgd_loop(loss, x0, eps=0.2, step_size=0.01, steps=5)
    torch.testing.assert_close(found, x0 + 0.05 * w.sign(), rtol=0, atol=1e-12)
    start = x0 - 0.1
    found = pgd_loop(loss, x0, eps=0.2, step_size=0.01, steps=5, start=start)
    torch.testing.assert_close(found, start + 0.05 * w.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_momentum_is_the_sum_of_gradients_each_over_its_own_l1_norm(decay: float) -> None:
    gradients = [direction(seed) * scale for seed, scale in ((1, 1.0), (2, 1e6), (3, 1e-6))]
    rule, velocity = momentum_rule(decay), torch.zeros(SHAPE, dtype=torch.float64)
    for gradient in gradients:
        norms = torch.tensor([float(image.abs().sum()) for image in gradient])
        velocity = decay * velocity + gradient / norms.double().view(-1, 1, 1, 1)
        assert torch.equal(rule(gradient), velocity.sign())


def test_momentum_of_one_image_does_not_depend_on_its_neighbours() -> None:
    together, alone = momentum_rule(1.0), momentum_rule(1.0)
    for seed in (1, 2, 3):
        gradient = direction(seed)
        loud = gradient.clone()
        loud[1:] *= 1e9
        assert torch.equal(together(loud)[0], alone(gradient[:1])[0])


def test_a_zero_gradient_stays_where_it_is() -> None:
    x0, w = images(), direction()
    w[1] = 0.0
    for rule in (None, momentum_rule(1.0)):
        found = pgd_loop(
            lambda x: (x * w).flatten(1).sum(1), x0, eps=0.1, step_size=0.1, steps=3, rule=rule
        )
        assert torch.equal(found[1], x0[1])
        assert bool(found.isfinite().all())
        assert not torch.equal(found[0], x0[0])
    tiny = torch.full(SHAPE, 1e-44, dtype=torch.float32)
    assert bool(momentum_rule(1.0)(tiny).isfinite().all())


def test_an_image_whose_gradient_was_zero_moves_once_it_has_one() -> None:
    rule, later = momentum_rule(1.0), direction()
    first = direction()
    first[1] = 0.0
    assert rule(first)[1].tolist() == torch.zeros(SHAPE[1:]).tolist()
    assert torch.equal(rule(later)[1], later[1].sign())


def test_the_cw_margin_is_the_best_wrong_score_less_the_right_one() -> None:
    scores = torch.tensor([[2.0, 5.0, 1.0], [0.0, -3.0, -1.0], [4.0, 4.0, 0.0]])
    margin = losses.cw_margin(lambda x: scores, torch.tensor([1, 1, 0]))
    assert margin(images()).tolist() == [-3.0, 3.0, 0.0]


def test_the_cw_margin_climbs_from_the_right_class_to_the_best_wrong_one() -> None:
    model, x0, labels = Linear(4, 0), images(), torch.tensor([0, 1, 2])
    scores = model(x0).detach()
    best = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)
    expected = (model.weight[best] - model.weight[labels]).detach().view(SHAPE).sign()
    found = pgd_loop(losses.cw_margin(model, labels), x0, eps=1e-4, step_size=1e-4, steps=1)
    torch.testing.assert_close(found, (x0 + 1e-4 * expected).clamp(0, 1), rtol=0, atol=1e-12)


def test_cross_entropy_is_of_each_image() -> None:
    model, x0, labels = Linear(4, 0), images(), torch.tensor([0, 1, 2])
    with torch.no_grad():
        found = pgd.cross_entropy(model, labels)(x0)
        shares = model(x0).softmax(1).tolist()
    expected = [-math.log(shares[row][label]) for row, label in enumerate(labels.tolist())]
    assert found.tolist() == pytest.approx(expected)


def test_the_combinations_are_mean_logits_and_the_log_of_the_mean_softmax() -> None:
    members, x0 = [Linear(4, 0), Linear(4, 1), Linear(4, 2)], images()
    logits = [member(x0) for member in members]
    torch.testing.assert_close(Ensemble(members)(x0), (logits[0] + logits[1] + logits[2]) / 3)
    softmax = losses.mean_softmax_output(members)(x0)
    expected = sum((each.softmax(1) for each in logits), torch.zeros(())) / 3
    torch.testing.assert_close(softmax, expected.log())
    torch.testing.assert_close(softmax.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_mean_softmax_survives_logits_that_saturate() -> None:
    sure = [nn.Linear(16, 3).double() for _ in range(2)]
    for module, winner in zip(sure, (0, 1), strict=True):
        module.weight.data.zero_()
        module.bias.data = torch.eye(3, dtype=torch.float64)[winner] * 1e4
    flat = [nn.Sequential(nn.Flatten(), module) for module in sure]
    found = losses.mean_softmax_output(flat)(images())
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, :2], torch.full((3, 2), math.log(0.5)).double())


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(0.001, 1.0),
    step_size=st.floats(0.001, 1.0),
    steps=st.integers(1, 4),
    momentum=st.booleans(),
    margin=st.booleans(),
    begin=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_attack_stays_in_ball_and_box_and_leaves_all_else_alone(
    eps: float,
    step_size: float,
    steps: int,
    momentum: bool,
    margin: bool,
    begin: bool,
    single: bool,
    seed: int,
) -> None:
    dtype = torch.float32 if single else torch.float64
    model, labels = Linear(4, seed).to(dtype), torch.tensor([0, 1, 2])
    x0 = images(seed).mul(1.4).sub(0.2).clamp(0, 1).to(dtype)
    kept_x0, kept_weight = x0.clone(), model.weight.detach().clone()
    loss = (losses.cw_margin if margin else pgd.cross_entropy)(model, labels)

    def attack() -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        start = random_start(x0, eps, draw) if begin else None
        return pgd_loop(
            loss,
            x0,
            eps=eps,
            step_size=step_size,
            steps=steps,
            rule=momentum_rule(1.0) if momentum else None,
            start=start,
        )

    found = attack()
    slack = 1e-6 if single else 1e-12
    assert float((found - x0).abs().max()) <= eps + slack
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(found, attack())
    assert torch.equal(x0, kept_x0)
    assert torch.equal(model.weight, kept_weight)
    assert model.weight.grad is None
    assert not x0.requires_grad
    assert not found.requires_grad


def test_random_starts_fill_the_ball_and_follow_their_generator() -> None:
    x0 = torch.full((2000, 1, 1, 1), 0.5)
    draw = torch.Generator().manual_seed(0)
    first, second = random_start(x0, 0.2, draw), random_start(x0, 0.2, draw)
    again = random_start(x0, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    noise = first - x0
    assert float(noise.abs().max()) <= 0.2 + 1e-6
    assert float(noise.min()) < -0.19
    assert float(noise.max()) > 0.19
    assert abs(float(noise.mean())) < 0.02
    edge = random_start(torch.zeros(50, 1, 1, 1), 0.2, draw)
    assert float(edge.min()) == 0.0
    assert float(edge.max()) <= 0.2


def test_projection_is_the_nearest_point_of_ball_and_box() -> None:
    x0 = torch.tensor([0.05, 0.5, 0.95]).view(3, 1, 1, 1)
    x = torch.tensor([-1.0, 0.55, 2.0]).view(3, 1, 1, 1)
    assert project(x, x0, 0.1).flatten().tolist() == pytest.approx([0.0, 0.55, 1.0])
    assert project(x, x0, 0.01).flatten().tolist() == pytest.approx([0.04, 0.51, 0.96])


def test_pgd_raises_the_loss_of_a_network_more_with_more_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x0, labels = images(), torch.tensor([0, 1, 2])
    loss = pgd.cross_entropy(model, labels)
    clean = F.cross_entropy(model(x0), labels, reduction="none")
    one = loss(pgd_loop(loss, x0, eps=0.3, step_size=0.3, steps=1))
    many = loss(pgd_loop(loss, x0, eps=0.3, step_size=0.03, steps=30))
    assert bool((one > clean).all())
    assert bool((many >= one - 1e-9).all())
