"""Every gate: an honest evaluation passes it, a broken defence or a broken attack does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.report import Gate
from dverge_serve.images import to_float
from export.parity import Parity
from tests.verification.models import (
    EPS,
    VALUES,
    Linear,
    Masked,
    Quantised,
    Saturated,
    Softmax,
    TorchEngine,
    attack_linear,
    linear_split,
)
from tests.verification.report.schema import REPORT_SCHEMA
from verification import gates, model_gates
from verification.attacks import rounds
from verification.attacks.apgd import AdaptivePGD
from verification.attacks.gradient_attack import GradientAttack, Noise
from verification.attacks.outcomes import Outcomes
from verification.attacks.presets import Variant, large, suite
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.attacks.universal_patterns import UniversalPatterns
from verification.attacks.white_box_presets import SAMPLE
from verification.gradients import flow
from verification.metrics.robust_accuracy import comparison
from verification.next_steps import FAILED, NOT_RUN, advised
from verification.self_test import self_test


def asked_twice(engine: TorchEngine) -> tuple[Scores, Scores]:
    images = to_float(linear_split(VALUES).images.numpy())
    return engine.run_all(images), engine.run_all(images)


def scores_of(*rows: list[float]) -> Scores:
    logits = np.array(rows, np.float32)
    return Scores(logits, logits[:, None])


def outcome_of(clean: list[int], **survived: list[int]) -> Outcomes:
    masks = {
        (name.replace("_", " "), EPS, version): np.array(mask, bool)
        for name, mask in survived.items()
        for version in ("float", "delivered")
    }
    right = np.array(clean, bool)
    ran = {key[:2]: np.ones(len(right), bool) for key in masks}
    return Outcomes(masks, right, np.zeros(len(right), bool), ran)


def test_an_honest_model_passes_every_gate_about_it() -> None:
    outcome, chosen = attack_linear(Linear(), VALUES)
    members: list[torch.nn.Module] = [Linear()]
    zero, broken, norms = flow(members, linear_split(VALUES), chosen)
    first, second = asked_twice(TorchEngine(members))
    checks = [
        gates.finite([outcome]),
        model_gates.deterministic((first, second), (first, second)),
        model_gates.not_probabilities(first),
        model_gates.nonzero_gradient(zero, broken),
        gates.eps_8bit([outcome]),
        gates.grows_with_eps(outcome, chosen, [EPS]),
        gates.iterative_beats_single(outcome, chosen, [EPS]),
        gates.converged(outcome, chosen, [EPS]),
        gates.weaker_never_beats(outcome, chosen, [EPS]),
    ]
    assert [gate.name for gate in checks if not gate.passed] == []
    assert gates.verdict(checks) == "VALID"
    # The margin is 2 * 10 * (mean - 0.5): its gradient has length 20 / sqrt(64).
    assert norms == pytest.approx([20 / 8])


@pytest.mark.parametrize("defence", [Saturated(), Quantised()])
def test_answers_in_steps_have_no_gradient(defence: torch.nn.Module) -> None:
    outcome, chosen = attack_linear(defence, VALUES)
    zero, broken, _ = flow([defence], linear_split(VALUES), chosen)
    gate = model_gates.nonzero_gradient(zero, broken)
    assert gate.passed is False
    assert gates.verdict([gate]) == "INCONCLUSIVE"
    assert gates.weaker_never_beats(outcome, chosen, [EPS]).passed is False


def test_weaker_never_beats_detects_masked_gradients() -> None:
    outcome, chosen = attack_linear(Masked(), VALUES)
    zero, broken, _ = flow([Masked()], linear_split(VALUES), chosen)
    assert model_gates.nonzero_gradient(zero, broken).passed  # it leads nowhere
    gate = gates.weaker_never_beats(outcome, chosen, [EPS])
    assert gate.passed is False
    assert gates.verdict([gate]) == "INCONCLUSIVE"


def test_deterministic_detects_a_random_defence() -> None:
    same, other = [asked_twice(TorchEngine([Linear()], noise=noise)) for noise in (0.0, 0.05)]
    assert model_gates.deterministic(same, same).passed
    for pairs in ((other, same), (same, other)):  # at another time, or in another batch
        gate = model_gates.deterministic(*pairs)
        assert gate.passed is False
        assert gates.verdict([gate]) == "INVALID"


def test_outputs_that_are_not_finite_make_it_invalid() -> None:
    outcome, _ = attack_linear(Linear(), [20, 200], broken=True)
    gate = gates.finite([outcome])
    assert gate.passed is False
    assert gates.verdict([gate]) == "INVALID"
    assert not outcome.robust([], EPS, ["float"]).any()
    # Never a success of the attacker: what Square and the gates see stays a number.
    broken = asked_twice(TorchEngine([Linear()], broken=True))
    assert model_gates.deterministic(broken, broken).passed


def test_probabilities_where_logits_are_expected_make_it_invalid() -> None:
    gate = model_gates.not_probabilities(asked_twice(TorchEngine([Softmax()]))[0])
    assert gate.passed is False
    assert gates.verdict([gate]) == "INVALID"
    assert model_gates.not_probabilities(scores_of([0.5, 0.5], [2.0, -1.0])).passed


def test_a_gradient_that_is_not_a_number_counts_as_none() -> None:
    class Broken(Linear):
        def score(self, x: torch.Tensor) -> torch.Tensor:
            return super().score(x) + (x - x).sum((1, 2, 3)).sqrt()

    _, chosen = attack_linear(Linear(), [120])
    zero, broken, _ = flow([Broken()], linear_split(VALUES), chosen)
    assert broken.all()
    assert model_gates.nonzero_gradient(zero, broken).passed is False
    assert model_gates.nonzero_gradient(None, None).passed is None


def test_an_attack_that_leaves_its_ball_makes_it_invalid() -> None:
    outcome, _ = attack_linear(Linear(), [20, 200])
    assert gates.eps_8bit([outcome]).passed
    outcome.violations = 1
    assert gates.verdict([gates.eps_8bit([outcome])]) == "INVALID"


def test_parity_takes_the_worst() -> None:
    good, bad = Parity(5, 0.0, 1e-4, 0), Parity(5, 1.0, 1e-4, 0)
    assert model_gates.parity([good]).passed
    assert model_gates.parity([good, bad]).passed is False
    assert model_gates.parity(None).passed is None
    assert gates.verdict([model_gates.parity(None)]) == "INCONCLUSIVE"
    assert model_gates.variant_parity(0.99, "int8").passed
    assert model_gates.variant_parity(0.9, "int8").passed is False


def test_robustness_that_rises_with_eps_is_not_believed() -> None:
    _, chosen = attack_linear(Linear(), [120])
    noise = [attack for attack in chosen if isinstance(attack, Noise)]
    outcome = outcome_of([1] * 10, noise=[0] * 10)
    falling = dict(outcome.survived)
    for version in ("float", "delivered"):
        falling["noise", 0.1, version] = np.ones(10, bool)
    outcome.survived = falling
    assert gates.grows_with_eps(outcome, noise, [EPS]).passed
    assert gates.grows_with_eps(outcome, noise, [EPS, 0.1]).passed is False


def test_a_larger_ball_breaks_the_images_that_a_smaller_one_did() -> None:
    pgd = [GradientAttack(name="pgd", threat="white_box", source="target")]
    outcome = outcome_of([1] * 10)
    for version in ("float", "delivered"):
        outcome.survived["pgd", EPS, version] = np.arange(10) != 0
        outcome.survived["pgd", 0.1, version] = np.arange(10) > 1
    assert gates.grows_with_eps(outcome, pgd, [EPS, 0.1]).passed
    for version in ("float", "delivered"):  # as many, but others
        outcome.survived["pgd", 0.1, version] = np.arange(10) != 1
    gate = gates.grows_with_eps(outcome, pgd, [EPS, 0.1])
    assert gate.passed is False
    assert "1 that white-box attacks broke" in gate.detail


def test_at_a_radius_that_hides_the_image_nothing_but_chance_is_left() -> None:
    attack, eps = large("linf", 64)
    for model, passes in ((Linear(), True), (Quantised(), False)):
        target = Target(TorchEngine([model]), [model])
        values = [0, 60, 120, 130, 180, 255]
        outcome = run_suite([attack], {}, {"m": target}, linear_split(values), [eps], seed=0)["m"]
        assert gates.reaches_chance(outcome, attack, eps, classes=2).passed is passes
    assert gates.reaches_chance(None, attack, eps, classes=2).passed is None


def test_one_step_must_not_break_what_many_do_not() -> None:
    chosen = suite(Variant(preset="quick", classes=2), ["s"])
    single, many = "fgsm-ce on mean-logits", "pgd-ce on mean-logits"
    outcome = outcome_of([1] * 120)
    for version in ("float", "delivered"):
        outcome.survived[single, EPS, version] = np.arange(120) >= 5
        outcome.survived[many, EPS, version] = np.arange(120) >= 4
    outcome.ran = {(single, EPS): np.ones(120, bool), (many, EPS): np.ones(120, bool)}
    assert gates.iterative_beats_single(outcome, chosen, [EPS]).passed  # 1 is allowed
    for version in ("float", "delivered"):
        outcome.survived[many, EPS, version] = np.arange(120) >= 3
    assert gates.iterative_beats_single(outcome, chosen, [EPS]).passed is False
    nothing = outcome_of([1] * 120)
    assert gates.iterative_beats_single(nothing, chosen, [EPS]).passed is None


QUICK = suite(Variant(preset="quick", classes=2), [])
ROUNDS = rounds.searches(QUICK)["apgd"]  # ce, cw, ce, cw, ...
ANNEALED = rounds.searches(QUICK)["annealed"]


def after_rounds(*broken: int, search: Sequence[AdaptivePGD] = ROUNDS) -> Outcomes:
    """Rounds at two radii: at the first everything stands, at the second each breaks so many."""
    outcome, left = outcome_of([1] * 400), np.ones(400, bool)
    for attack, count in zip(search, broken, strict=False):
        fallen = np.flatnonzero(left)[:count]
        for eps in (EPS, 2 * EPS):
            outcome.ran[attack.name, eps] = left if eps > EPS else np.ones(400, bool)
            for version in ("float", "delivered"):
                outcome.survived[attack.name, eps, version] = np.ones(400, bool)
        outcome.survived[attack.name, 2 * EPS, "float"][fallen] = False
        left = left & outcome.survived[attack.name, 2 * EPS, "float"]
    return outcome


@pytest.mark.parametrize(
    ("broken", "passes"),
    [((9, 0), False), ((9, 0, 0), True), ((9, 1, 0), True), ((9, 1, 1), False)],
)
def test_the_last_cycle_must_break_less_than_half_a_percent(
    broken: tuple[int, ...], passes: bool
) -> None:
    outcome = after_rounds(*broken)
    gate = gates.converged(outcome, ROUNDS, [2 * EPS, EPS])
    assert gate.passed is passes
    told = f"0 at eps {EPS:g} (of {len(broken)} rounds), {sum(broken[-2:])} at eps {2 * EPS:g} "
    assert told in gate.detail
    assert gates.converged(outcome, ROUNDS, [EPS]).passed
    # Another round is run only where the cycle before it broke enough.
    following = ROUNDS[len(broken)]
    assert rounds.is_over(following, ROUNDS, outcome, EPS)
    assert rounds.is_over(following, ROUNDS, outcome, 2 * EPS) is passes
    fgsm, *_ = QUICK
    assert not rounds.is_over(fgsm, QUICK, outcome, EPS)  # not a round


@pytest.mark.parametrize(("broken", "passes"), [((0,), True), ((1,), False), ((5, 1), True)])
def test_one_image_of_the_sample_sends_annealed_pgd_on_to_all(
    broken: tuple[int, ...], passes: bool
) -> None:
    outcome = after_rounds(*broken, search=ANNEALED)
    assert gates.converged(outcome, ANNEALED, [2 * EPS]).passed is passes
    assert rounds.is_over(ANNEALED[len(broken)], QUICK, outcome, 2 * EPS) is passes
    assert (ANNEALED[0].sample, ANNEALED[1].sample) == (SAMPLE, 0)


def test_a_search_at_the_largest_radius_alone_is_not_missed_at_the_others() -> None:
    alone = [replace(each, only_eps=2 * EPS) for each in ANNEALED]
    outcome = after_rounds(0, search=alone)
    assert gates.converged(outcome, alone, [EPS, 2 * EPS]).passed
    assert gates.converged(outcome_of([1]), alone, [EPS, 2 * EPS]).passed is None


def test_a_radius_without_a_whole_cycle_has_not_converged() -> None:
    assert gates.converged(after_rounds(0), ROUNDS, [EPS]).passed is None
    assert gates.converged(after_rounds(0, 0), ROUNDS, [EPS, 9 * EPS]).passed is None
    assert gates.converged(outcome_of([1]), ROUNDS, [EPS]).passed is None


def test_few_images_are_not_forgiven_more() -> None:
    counts = {n: gates.allowed(n) for n in (1, 20, 21, 120, 360, 1000, 10000)}
    assert counts == {1: 0, 20: 0, 21: 1, 120: 1, 360: 3, 1000: 5, 10000: 33}


def test_answers_no_better_than_one_for_all_are_no_robustness() -> None:
    labels = np.repeat(np.arange(10), 12)
    right = np.zeros(120, bool)
    cases = (
        (60, "VALID"),
        (19, "VALID"),
        (16, "INCONCLUSIVE"),
        (12, "INVALID"),
        (0, "INVALID"),
    )
    for count, verdict in cases:
        right[:] = np.arange(120) < count
        gate = model_gates.better_than_chance(right, labels, 10)
        assert gates.verdict([gate]) == verdict, count
    uneven = np.repeat([0, 1], [90, 10])  # always answering 0 is right on 90%
    assert model_gates.better_than_chance(uneven == 0, uneven, 2).passed is False


def test_every_gate_that_does_not_pass_says_what_to_do() -> None:
    names = set(REPORT_SCHEMA["properties"]["gates"]["items"]["properties"]["name"]["enum"])
    assert set(FAILED) == names
    assert set(NOT_RUN) <= names
    passed, failing = Gate("parity", True, "INVALID", ""), Gate("parity", False, "INVALID", "")
    own = Gate("parity", None, "INVALID", "", "a step of its own")
    assert [gate.next_step for gate in advised([passed, failing, own])] == [
        "",
        FAILED["parity"],
        "a step of its own",
    ]


def test_attacks_by_queries_are_allowed_few_of_the_images_they_saw() -> None:
    chosen = suite(Variant(preset="quick", classes=2), ["s"])
    square = next(attack for attack in chosen if attack.threat == "queries")
    outcome = outcome_of([1] * 360, **{"pgd-cw on mean-logits": [1] * 360, "noise": [1] * 360})
    for version in ("float", "delivered"):
        outcome.survived[square.name, EPS, version] = np.arange(360) >= 2
    for seen, passes in ((360, True), (60, False)):
        outcome.ran[square.name, EPS] = np.arange(360) < seen
        gate = gates.weaker_never_beats(outcome, chosen, [EPS])
        assert gate.passed is passes
    assert gate.detail.startswith("2 images at eps 0.05 broken by queries")


def test_a_control_that_stands_makes_it_inconclusive() -> None:
    robust, chosen = attack_linear(Linear(), [0, 255, 10, 240])
    assert gates.control_falls(robust, robust, chosen, [EPS]).passed is False
    falling, chosen = attack_linear(Linear(), [125, 130, 120, 255])
    assert gates.control_falls(robust, falling, chosen, [EPS]).passed
    assert "auto" not in gates.control_falls(robust, falling, chosen, [EPS]).detail
    searched = gates.control_falls(robust, falling, chosen, [EPS], searched=True)
    assert searched.detail.endswith("; eps auto chose radii at which the control falls")
    (patterns,) = [each for each in chosen if isinstance(each, UniversalPatterns)]
    assert (
        gates.control_falls(robust, falling, [patterns], [EPS]).passed is False
    )  # say nothing about it
    assert gates.control_falls(robust, None, chosen, [EPS]).passed is None


def test_a_model_that_falls_itself_needs_no_control() -> None:
    robust, _ = attack_linear(Linear(), [0, 255, 10, 240])
    falling, chosen = attack_linear(Linear(), [125, 130, 120, 255])
    for control in (robust, falling, None):
        gate = gates.control_falls(falling, control, chosen, [EPS])
        assert gate.passed
        assert "the model itself keeps 0.250" in gate.detail


def test_the_self_test_finds_the_breakable_images_and_no_others() -> None:
    split = linear_split([0, 3, 60, 90, 100, 111, 120, 127, 128, 131, 140, 150, 170, 200, 250, 255])
    expected, found = self_test(split, seed=0)
    assert expected.any()
    assert not expected.all()
    assert gates.self_test_found(expected, found).passed
    missed: Any = found.copy()
    missed[np.flatnonzero(expected)[0]] = False
    assert gates.verdict([gates.self_test_found(expected, missed)]) == "INVALID"
    assert gates.self_test_found(expected, np.ones_like(found)).passed is False


def test_rounds_of_either_model_count_in_a_comparison() -> None:
    """At the larger radius the first model's rounds end later than the other's."""
    ours, theirs = after_rounds(9, 0, 5, 0, 0), after_rounds(9, 0, 0)
    (row,) = [
        each for each in comparison(ours, theirs, ROUNDS, [2 * EPS]) if each["what"] == "white_box"
    ]
    assert (row["this"], row["other"]) == (386 / 400, 391 / 400)
