"""False defences are caught by a gate, or the figure is as low as an attacker who knows them gets.

The attacker here shares nothing with the suite: gradients of the network behind the defence, on
the values that the data uses, and many random restarts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dverge_serve.engine.report import Gate
from dverge_serve.images import to_float
from tests.verification import false_defences as plants
from tests.verification.false_defences import LEVELS, Wrapped, digits, trained
from tests.verification.models import TorchEngine, shorter
from training.data import splits
from training.data.splits import Split
from verification import gates, model_gates
from verification.attacks.presets import Variant, large, suite
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.attacks.value_grid import coarse_levels, grid_attacks
from verification.gradients import flow
from verification.metrics.robust_accuracy import one_by_one
from verification.path_integrals import unexplained

RADIUS = 0.1


def judged(model: nn.Module, split: Split, noise: float = 0.0) -> tuple[list[Gate], float]:
    """Return the gates about a model under `quick`, and its robust accuracy under all attacks."""
    engine = TorchEngine([model], noise=noise)
    target = {"model": Target(engine, [model])}
    sources = {"surrogate": ([trained(4)], "surrogate")}
    whole = [
        *suite(Variant(preset="quick", classes=10), ["surrogate"]),
        *grid_attacks(coarse_levels(split.images), ["surrogate"], "linf"),
    ]
    chosen = [shorter(attack, 10, 50) for attack in whole if attack.gate != "converged"]
    outcome = run_suite(chosen, sources, target, split, [RADIUS], seed=0)["model"]
    far, eps = large("linf", 64)
    hidden = run_suite([far], {}, target, split, [eps], seed=0)["model"]
    zero, broken, _ = flow([model], split, chosen)
    worst = outcome.worst[RADIUS, "white_box"]
    found = unexplained([model], engine, split, worst, RADIUS, "linf", 0)
    images = to_float(split.images.numpy())
    return [
        model_gates.deterministic(
            (engine.run_all(images), engine.run_all(images)),
            one_by_one(engine, outcome.worst[RADIUS, "transfer"][:32]),
        ),
        model_gates.better_than_chance(outcome.clean, split.labels.numpy(), 10),
        model_gates.nonzero_gradient(zero, broken),
        model_gates.gradient_is_the_models(found),
        gates.grows_with_eps(outcome, chosen, [RADIUS]),
        gates.reaches_chance(hidden, far, eps, 10),
        gates.iterative_beats_single(outcome, chosen, [RADIUS]),
        gates.weaker_never_beats(outcome, chosen, [RADIUS]),
    ], float(outcome.robust(chosen, RADIUS).mean())


def truth(model: nn.Module, split: Split) -> float:
    """Return what an attacker leaves who knows the networks behind the defence."""
    x0, labels = splits.to_float(split.images), split.labels
    draw = torch.Generator().manual_seed(0)
    own: list[nn.Module] = [trained(1), trained(2), trained(3, plants.winners)]
    stands = model(x0).argmax(1) == labels
    for inner in own:
        for _ in range(3):
            x = x0 + RADIUS * (2 * torch.rand(x0.shape, generator=draw) - 1)
            for _ in range(20):
                x = x.detach().requires_grad_()
                loss = torch.nn.functional.cross_entropy(inner(x), labels, reduction="sum")
                (slope,) = torch.autograd.grad(loss, x)
                x = (x + RADIUS / 5 * slope.sign()).clamp(x0 - RADIUS, x0 + RADIUS).clamp(0, 1)
                on_grid = LEVELS[(x.detach()[..., None] - LEVELS).abs().argmin(-1)]
                inside = (on_grid - x0).abs() <= RADIUS
                for tried in (x.detach(), torch.where(inside, on_grid, x0)):
                    stands &= model(tried).argmax(1) == labels
    return float(stands.float().mean())


def failed(found: list[Gate]) -> set[str]:
    return {gate.name for gate in found if not gate.passed}


@pytest.mark.parametrize("count", [120, 360])
def test_an_honest_network_passes(count: int) -> None:
    split = digits(count)
    found, robust = judged(trained(1), split)
    assert failed(found) == set()
    assert abs(robust - truth(trained(1), split)) < 0.02


PLANTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], float]] = {
    "coarse off the data's values": (plants.off_grid, 0.0),
    "coarse off the data's values, leaking": (plants.off_grid, 0.01),
    "17 levels, leaking": (lambda inner, x: inner(plants.coarse(x, 16)), 0.03),
    "256 levels, leaking": (lambda inner, x: inner(plants.coarse(x, 255)), 0.1),
    "5 levels, leaking": (lambda inner, x: inner(plants.coarse(x, 4)), 0.03),
    "17 levels": (lambda inner, x: inner(plants.coarse(x, 16)), 0.0),
    "thermometer": (plants.thermometer, 0.0),
    "thermometer, leaking": (plants.thermometer, 0.03),
    "answers alone": (plants.answers, 0.0),
    "answers alone, leaking": (plants.answers, 0.01),
    "below chance": (plants.next_class, 0.0),
    "k-WTA": (plants.winner_takes_all, 0.0),
    "noise by the pixels": (plants.hashed, 0.0),
    "training labels for perturbed images": (plants.remembered, 0.0),
    "training labels for perturbed images, leaking": (plants.remembered, 0.01),
    "saturated": (plants.saturated, 0.0),
    "huge logits": (plants.huge, 0.0),
    "a step along a checkerboard": (plants.checkered, 0.0),
    "a true gradient that leads astray": (plants.rippled, 0.0),
    "shifts by the pixels": (plants.shifted, 0.0),
    "undefended when alone": (plants.lonely, 0.0),
    "undefended among clean images": (plants.accompanied, 0.0),
}


@pytest.mark.parametrize("count", [120, 360])
@pytest.mark.parametrize("name", PLANTS)
def test_a_false_defence_is_caught_or_its_figure_is_true(name: str, count: int) -> None:
    model, split = Wrapped(*PLANTS[name]), digits(count)
    found, robust = judged(model, split)
    assert failed(found) or robust <= truth(model, split) + 0.02


def test_each_gate_catches_its_kind() -> None:
    split = digits(120)

    def gate(name: str) -> set[str]:
        return failed(judged(Wrapped(*PLANTS[name]), split)[0])

    assert "better-than-chance" in gate("below chance")
    assert "nonzero-gradient" in gate("answers alone")
    for name in ("17 levels, leaking", "k-WTA", "noise by the pixels", "thermometer, leaking"):
        assert "gradient-is-the-models" in gate(name), name
    assert "deterministic" in failed(judged(trained(1), split, noise=0.5)[0])
    for name in ("undefended when alone", "undefended among clean images"):
        assert "deterministic" in gate(name), name


def test_images_on_the_datas_own_values_walk_past_a_defence_of_the_others() -> None:
    split = digits(120)
    model = Wrapped(plants.off_grid, 0.01)
    assert judged(model, split)[1] <= truth(model, split) + 0.02
    assert coarse_levels(split.images) == tuple((LEVELS * 255).round().int().tolist())


def test_a_weakness_along_a_fixed_pattern_shows_in_the_transfer_figure() -> None:
    split = digits(120)
    model = Wrapped(plants.checkered)
    x = splits.to_float(split.images)
    assert float((model(x).argmax(1) == trained(1)(x).argmax(1)).float().mean()) == 1  # as clean
    found, robust = judged(model, split)
    assert failed(found) == {"weaker-never-beats"}
    assert robust == 0


def test_data_with_all_levels_has_no_grid_of_its_own() -> None:
    assert coarse_levels(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)) == ()
    assert grid_attacks((), ["s"], "linf") == []
    assert grid_attacks((0, 255), ["s"], "l2") == []
    found = grid_attacks((0, 255), ["s"], "linf")
    assert [attack.threat for attack in found] == ["white_box", "transfer"] * 2


def test_every_iterate_lies_on_the_grid_inside_the_ball() -> None:
    split = digits(40)
    levels = coarse_levels(split.images)
    x0 = splits.to_float(split.images)
    for attack in grid_attacks(levels, ["s"], "linf"):
        for eps in (0.05, 0.1, 0.15):  # at 0.05 no other value is within reach
            made = attack(trained(1), x0, split.labels, eps)
            steps = (made * 255).round()
            assert set(steps.flatten().tolist()) <= set(levels)
            assert float((made - x0).abs().max()) <= eps + 1e-6
            assert bool((made != x0).any()) is (eps > 0.05)


def test_a_gradients_integral_is_the_change_of_the_loss() -> None:
    split = digits(24)
    honest = trained(1)
    shares = unexplained([honest], TorchEngine([honest]), split, None, 0.15, "linf", 0)
    assert shares.shape == (24,)
    assert shares.max() < 0.02
    other = unexplained([trained(2)], TorchEngine([honest]), split, None, 0.15, "linf", 0)
    assert np.median(other) > 0.05
    assert not model_gates.gradient_is_the_models(other).passed  # 24 images are enough
    less = unexplained([honest], TorchEngine([honest]), split, None, 0.15, "linf", 0, most=15)
    assert (less.shape, less.max() < 0.02) == ((15,), True)
    l2 = unexplained([honest], TorchEngine([honest]), split, split.images.numpy(), 1.0, "l2", 0)
    assert l2.max() < 0.02
    few = model_gates.gradient_is_the_models(shares[:8])
    assert few.passed is None
    assert "too few" in few.detail
    assert model_gates.gradient_is_the_models(shares).passed
    assert model_gates.gradient_is_the_models(other).passed is False
    assert model_gates.gradient_is_the_models(None).passed is None
    assert model_gates.gradient_is_the_models(np.full(50, 0.3)).passed is False
    assert model_gates.gradient_is_the_models(np.full(50, 0.3), "int8").passed
