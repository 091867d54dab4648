"""The checks an evaluation must pass before its figures can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.stats import binom

from dverge_serve.engine.radius import written
from dverge_serve.engine.report import Gate, Verdict
from verification.attacks.attack import Attack
from verification.attacks.gradient_attack import GradientAttack
from verification.attacks.outcomes import Mask, Outcomes
from verification.attacks.rounds import CONVERGED, last_cycle, searches

CONTROL_KEEPS = 0.5  # share of its clean accuracy the control may keep at the largest eps
SURROGATES_BEHIND = 0.1  # of the model's clean accuracy, on the same images
RARE = 1 / 400  # of the images: what chance alone lets a weaker attack break
DOUBT = 0.05  # level of the one-sided tests
NO_WEIGHTS = "no weights to take gradients from"


def verdict(gates: Sequence[Gate]) -> Verdict:
    """Return the verdict on the evaluation: the worst of all gates."""
    if any(gate.passed is False and gate.failure == "INVALID" for gate in gates):
        return "INVALID"
    return "VALID" if all(gate.passed for gate in gates) else "INCONCLUSIVE"


def allowed(n: int) -> int:
    """Return how many of `n` images a weaker attack may break alone without failing a gate.

    A one-sided binomial test at level 0.05: one more would be too many for an attack that misses
    one image of 400 by chance. That is none of 20, 1 of 120, 3 of 360, 5 of 1,000.
    """
    return int(binom.ppf(1 - DOUBT, n, RARE))


def finite(outcomes: Sequence[Outcomes]) -> Gate:
    """No output was NaN or infinite; such an output is never a success of an attack."""
    count = sum(int(outcome.invalid.sum()) for outcome in outcomes)
    return Gate("finite", count == 0, "INVALID", f"{count} images had outputs that are not finite")


def eps_8bit(outcomes: Sequence[Outcomes]) -> Gate:
    """Every adversarial image lies in its ball and in the box, as floats and in 8 bits."""
    count = sum(outcome.violations for outcome in outcomes)
    scored = sum(outcome.scored for outcome in outcomes)
    return Gate(
        "eps-8bit", count == 0, "INVALID", f"{count} of {scored} images lay outside their ball"
    )


def grows_with_eps(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> Gate:
    """A larger ball breaks at least as many images, and by white-box attacks the same ones.

    The second is what leaving out of smaller balls the images that stood in a larger one rests on.
    """
    kept = [int(outcome.clean.sum()), *(int(outcome.robust(suite, e).sum()) for e in sorted(eps))]
    rises = max((after - before for before, after in pairwise(kept)), default=0)
    white_box = [attack for attack in suite if attack.threat == "white_box"]
    standing = [outcome.robust(white_box, e) for e in sorted(eps)]
    missed = max((int((large & ~small).sum()) for small, large in pairwise(standing)), default=0)
    detail = (
        f"images that stand as eps grows: {', '.join(map(str, kept))}; {missed} that white-box "
        "attacks broke in a ball stood in the next larger one"
    )
    ok = max(rises, missed) <= allowed(len(outcome.clean))
    return Gate("grows-with-eps", ok, "INCONCLUSIVE", detail)


def reaches_chance(outcome: Outcomes | None, attack: Attack, eps: float, classes: int) -> Gate:
    """At a radius that can hide the whole image, accuracy is no better than chance."""
    name = "reaches-chance"
    if outcome is None or not outcome.has(attack, eps):
        return Gate(name, None, "INCONCLUSIVE", NO_WEIGHTS)
    left = float(outcome.robust([attack], eps, ["float"]).mean())
    detail = f"{left:.3f} left at eps {written(eps)}; chance is {1 / classes:.3f}"
    return Gate(name, left <= 1 / classes, "INCONCLUSIVE", detail)


def iterative_beats_single(
    outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]
) -> Gate:
    """Images that one step breaks are broken by many steps too."""
    white_box = [each for each in suite if each.threat == "white_box"]
    single = [each for each in white_box if isinstance(each, GradientAttack) and each.steps == 1]
    many = [each for each in white_box if each not in single]
    name, what = "iterative-beats-single", "broken by one step and not by many"
    return _never_beats(name, outcome, (single, many), eps, what, NO_WEIGHTS)


def converged(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> Gate:
    """At each radius the last cycle of white-box rounds breaks less than half a percent."""
    told, ok = [], True
    for kind, search in searches(suite).items():
        radii = [each for each in sorted(eps) if search[0].only_eps in (None, each)]
        found = {each: last_cycle(search, outcome, each) for each in radii}
        if None in found.values():
            return Gate("converged", None, "INCONCLUSIVE", NO_WEIGHTS)
        last = {each: cycle for each, cycle in found.items() if cycle is not None}
        ok &= all(cycle.converged for cycle in last.values())
        broken = [
            f"{cycle.broken} at eps {each:g} (of {cycle.rounds} rounds)"
            for each, cycle in last.items()
        ]
        told.append(f"{kind}: {', '.join(broken)}")
    if not told:
        return Gate("converged", None, "INCONCLUSIVE", NO_WEIGHTS)
    detail = (
        f"images broken by the last cycle of white-box rounds: {'; '.join(told)}; "
        f"fewer than {CONVERGED:.1%} of {len(outcome.clean)} show that it has converged"
    )
    return Gate("converged", ok, "INCONCLUSIVE", detail)


def weaker_never_beats(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> Gate:
    """Noise, transfer and queries break almost nothing that white-box attacks do not.

    Otherwise gradients are masked and the white-box figure flatters. The images count as broken
    either way.
    """
    strong = [attack for attack in suite if attack.threat == "white_box"]
    name, not_run = "weaker-never-beats", "white-box attacks were not run"
    found = [
        _never_beats(
            name,
            outcome,
            ([attack for attack in suite if attack.threat == threat], strong),
            eps,
            f"broken by {told} and by no white-box attack",
            not_run,
        )
        for threat, told in (("transfer", "noise or transfer"), ("queries", "queries"))
    ]
    return next((gate for gate in found if not gate.passed), found[0])


def control_falls(
    model: Outcomes,
    control: Outcomes | None,
    suite: Sequence[Attack],
    eps: Sequence[float],
    what: str = "control",
    *,
    searched: bool = False,
) -> Gate:
    """The transfer attacks break the undefended control, or the model itself.

    If they break neither, the surrogates are too unlike the model to say anything about it. A low
    figure of the model needs no control to be believed. Universal patterns do not count here: they
    would say nothing about the surrogates.

    Args:
        model, control: their outcomes; None without a control.
        suite: the attacks.
        eps: the radii.
        what: the control is.
        searched: whether the radii are those at which it falls, found on some of these images.
    """
    name = "control-falls"
    transfer = [attack for attack in suite if attack.threat == "transfer" and not attack.asks]
    kept, clean = model.robust(transfer, max(eps)).mean(), model.clean.mean()
    if kept <= CONTROL_KEEPS * clean:
        control, what = model, "model itself"
    if control is None:
        return Gate(name, None, "INCONCLUSIVE", "no undefended control of this model's own run")
    kept, clean = control.robust(transfer, max(eps)).mean(), control.clean.mean()
    detail = (
        f"at eps {written(max(eps))} the {what} keeps {kept:.3f} of {clean:.3f} clean, "
        "universal patterns aside; "
        f"at most {CONTROL_KEEPS * clean:.3f} shows that the attacks bite"
    )
    if searched:
        detail += "; eps auto chose radii at which the control falls"
    return Gate(name, bool(kept <= CONTROL_KEEPS * clean), "INCONCLUSIVE", detail)


def surrogates_close(best: float | None, clean: float) -> Gate:
    """Some surrogate is about as good a classifier as the model.

    Adversarial images of poor networks are poor: any model looks robust to them.

    Args:
        best: clean accuracy of the best undefended surrogate on these images; None without one.
        clean: the model's.
    """
    name = "surrogates-close"
    if best is None:
        return Gate(name, None, "INCONCLUSIVE", "no undefended surrogate")
    detail = (
        f"the best undefended surrogate answers {best:.3f} of the clean images, the model "
        f"{clean:.3f} (at most {SURROGATES_BEHIND:g} behind)"
    )
    return Gate(name, best >= clean - SURROGATES_BEHIND, "INCONCLUSIVE", detail)


def self_test_found(expected: Mask, found: Mask) -> Gate:
    """The self-test, on a model whose breakable images are known, finds them and no others."""
    if expected.all() or not expected.any():
        detail = "too few images, or too alike, to plant some that fall and some that stand"
        return Gate("planted-found", None, "INVALID", detail)
    missed, invented = int((expected & ~found).sum()), int((found & ~expected).sum())
    detail = (
        f"of {int(expected.sum())} planted adversarial images {missed} were missed; "
        f"{invented} of {int((~expected).sum())} safe ones called broken"
    )
    return Gate("planted-found", missed == invented == 0, "INVALID", detail)


def _never_beats(
    name: str,
    outcome: Outcomes,
    attacks: tuple[Sequence[Attack], Sequence[Attack]],
    eps: Sequence[float],
    what: str,
    not_run: str,
) -> Gate:
    """At every radius, few images are broken by the weak and not by the strong.

    Few, of those that the weak were run on: attacks by queries see a part of them alone.
    """
    weak, strong = attacks
    ran = [[each for each in strong if outcome.has(each, e)] for e in eps]
    if not all(ran):
        return Gate(name, None, "INCONCLUSIVE", not_run)
    rows = []
    for chosen, e in zip(ran, eps, strict=True):
        count = int((outcome.robust(chosen, e) & ~outcome.robust(weak, e)).sum())
        seen = [outcome.ran[each.name, e] for each in weak if outcome.has(each, e)]
        limit = allowed(int(np.any(seen, axis=0).sum()) if seen else 0)
        rows.append((count - limit, count, limit, e))
    _, count, limit, at = max(rows)
    detail = f"{count} images at eps {written(at)} {what} (allowed {limit})"
    return Gate(name, count <= limit, "INCONCLUSIVE", detail)
