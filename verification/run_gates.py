"""The checks of one evaluation: every gate, on what the attacks found."""

from __future__ import annotations

import numpy as np
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.report import Gate
from dverge_serve.images import to_float
from dverge_serve.progress import say
from export.parity import compare, torch_scores
from training.models.ensemble import Ensemble
from verification import gates, model_gates
from verification.attacks import presets
from verification.attacks.batches import spread
from verification.attacks.outcomes import Outcomes
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import flow
from verification.leakage import Leakage, no_leakage
from verification.metrics.robust_accuracy import clean_scores, one_by_one
from verification.next_steps import advised
from verification.path_integrals import unexplained
from verification.self_test import CHECKING, self_test

HIDDEN = 120  # images, at most, that a large radius must hide
ALONE = 32  # images, at most, that are also scored one by one


def check(
    context: Context,
    model: Target,
    outcomes: dict[str, Outcomes],
    control: str,
    leakage: Leakage,
) -> list[Gate]:
    """Return every gate's result, in the report's order.

    Args:
        context: of the verification.
        model: what it is about.
        outcomes: of all targets by name, the model's first.
        control: what the control is.
        leakage: what of the test images was seen in training.
    """
    say("checking the model: the same answers twice, its gradients")
    mine, everyone = outcomes["model"], list(outcomes.values())
    clean = clean_scores(context.engine, context.split)
    zero, broken = None, None
    if model.members is not None:
        zero, broken, _ = flow(model.members, context.split, context.suite)
    named = "control" if control == "own" else f"control ({control})"
    labels, classes = context.split.labels.cpu().numpy(), len(context.engine.card.labels)
    found = [
        gates.finite(everyone),
        model_gates.deterministic(_again(context, clean), _alone(context, mine)),
        model_gates.not_probabilities(
            clean, context.config.labels is not None and model.members is None
        ),
        model_gates.better_than_chance(mine.clean & ~mine.invalid, labels, classes),
        no_leakage(leakage, context.training_known),
        model_gates.nonzero_gradient(zero, broken),
        _gradient_is_the_models(context, model, mine),
        gates.eps_8bit(everyone),
        _parity(context, model, mine),
        gates.grows_with_eps(mine, context.suite, context.eps),
        _reaches_chance(context, model),
        gates.iterative_beats_single(mine, context.suite, context.eps),
        gates.converged(mine, context.suite, context.eps),
        gates.weaker_never_beats(mine, context.suite, context.eps),
        gates.control_falls(
            mine,
            outcomes.get("control"),
            context.suite,
            context.eps,
            named,
            searched=context.config.auto_eps,
        ),
        gates.surrogates_close(_best_surrogate(context), float(mine.clean.mean())),
        gates.self_test_found(*self_test(context.split, context.config.seed)),
    ]
    return advised(found)


def _again(context: Context, clean: Scores) -> tuple[Scores, Scores]:
    """Score the clean images once more, the last ones first."""
    last_first = context.split.take(torch.arange(len(context.split)).flip(0))
    found = clean_scores(context.engine, last_first)
    return clean, Scores(found.logits[::-1], found.member_logits[::-1])


def _alone(context: Context, outcome: Outcomes) -> tuple[Scores, Scores]:
    """Score clean and attacked images in one batch, and one by one, as services are asked."""
    rows = spread(context.split, ALONE).cpu().numpy()
    attacked = [pixels for (eps, _), pixels in outcome.worst.items() if eps == max(context.eps)]
    clean = context.split.images.cpu().numpy()
    return one_by_one(context.engine, np.concatenate([each[rows] for each in (clean, *attacked)]))


def _gradient_is_the_models(context: Context, model: Target, outcome: Outcomes) -> Gate:
    """Integrate gradients to the edge of the largest ball, and ask the file."""
    if model.members is None:
        return model_gates.gradient_is_the_models(None)
    eps, config = max(context.eps), context.config
    worst = outcome.worst.get((eps, "white_box"))
    say("checking that the gradients explain the file's answers")
    ends = (context.split, worst, eps, config.norm, config.seed, context.preset.checked)
    left = unexplained(model.members, context.engine, *ends)
    return model_gates.gradient_is_the_models(left, context.engine.card.precision)


def _reaches_chance(context: Context, model: Target) -> Gate:
    """Attack at a radius that can hide the whole image."""
    attack, eps = presets.large(context.config.norm, context.split.images[0].numel())
    outcome = run_suite(
        [attack],
        {},
        {"model": model},
        context.split.take(spread(context.split, HIDDEN, context.preset.checked)),
        [eps],
        seed=context.config.seed,
        label=CHECKING,
    )["model"]
    return gates.reaches_chance(outcome, attack, eps, len(context.engine.card.labels))


def _best_surrogate(context: Context) -> float | None:
    """Return the best undefended surrogate's clean accuracy on the test images."""
    found = [
        context.surrogate_accuracy[each.name] for each in context.surrogates if each.undefended
    ]
    return max(found, default=None)


def _parity(context: Context, model: Target, outcome: Outcomes) -> Gate:
    """Compare torch with the engine on clean images and on the worst adversarial ones."""
    if model.members is None:
        return model_gates.parity(None)
    pairs, ensemble = [], Ensemble(model.members)
    for pixels in [context.split.images.cpu().numpy(), *outcome.worst.values()]:
        floats = to_float(pixels)
        x = torch.from_numpy(floats).to(context.split.images.device)
        pairs.append((torch_scores(ensemble, x), context.engine.run_all(floats)))
    if (precision := context.engine.card.precision) != "fp32":
        same = [(torch_.predictions == found.predictions).mean() for torch_, found in pairs]
        return model_gates.variant_parity(float(np.mean(same)), precision)
    return model_gates.parity([compare(*pair) for pair in pairs])
