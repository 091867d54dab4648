"""The checks of one evaluation: every gate, on what the attacks found."""

from __future__ import annotations

import numpy as np
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.report import Gate
from dverge_serve.images import to_float
from export.parity import compare, torch_scores
from training.data import splits
from training.models.ensemble import Ensemble
from verification import gates
from verification.attacks import presets
from verification.attacks.outcomes import Outcomes
from verification.attacks.suite import run_suite
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import flow
from verification.metrics.robust_accuracy import clean_scores
from verification.self_test import CHECKING, self_test


def check(
    context: Context, model: Target, outcomes: dict[str, Outcomes], control: str
) -> list[Gate]:
    """Return every gate's result, in the report's order.

    Args:
        context: of the verification.
        model: what it is about.
        outcomes: of all targets by name, the model's first.
        control: what the control is.
    """
    mine, everyone = outcomes["model"], list(outcomes.values())
    clean = clean_scores(context.engine, context.split)
    last_first = context.split.take(torch.arange(len(context.split)).flip(0))
    backwards = clean_scores(context.engine, last_first)
    again = Scores(backwards.logits[::-1], backwards.member_logits[::-1])
    zero, broken = None, None
    if model.members is not None:
        zero, broken, _ = flow(model.members, context.split, context.suite)
    named = "control" if control == "own" else f"control ({control})"
    return [
        gates.finite(everyone),
        gates.deterministic(clean, again),
        gates.not_probabilities(clean, context.config.labels is not None and model.members is None),
        gates.nonzero_gradient(zero, broken),
        gates.eps_8bit(everyone),
        _parity(context, model, mine),
        gates.grows_with_eps(mine, context.suite, context.eps),
        _reaches_chance(context, model),
        gates.iterative_beats_single(mine, context.suite, context.eps),
        gates.converged(mine, context.suite, context.eps),
        gates.weaker_never_beats(mine, context.suite, context.eps),
        gates.control_falls(outcomes.get("control"), context.suite, context.eps, named),
        gates.surrogates_close(_best_surrogate(context), float(mine.clean.mean())),
        gates.self_test_found(*self_test(context.split, context.config.seed)),
    ]


def _reaches_chance(context: Context, model: Target) -> Gate:
    """Attack at a radius that can hide the whole image."""
    attack, eps = presets.large(context.config.norm, context.split.images[0].numel())
    outcome = run_suite(
        [attack],
        {},
        {"model": model},
        context.split,
        [eps],
        seed=context.config.seed,
        label=CHECKING,
    )["model"]
    return gates.reaches_chance(outcome, attack, eps, len(context.engine.card.labels))


def _best_surrogate(context: Context) -> float | None:
    """Return the best undefended surrogate's clean accuracy on the test images."""
    x, labels = splits.to_float(context.split.images), context.split.labels.cpu().numpy()
    found = [
        float((torch_scores(Ensemble(each.members), x).predictions == labels).mean())
        for each in context.surrogates
        if each.run.config.method == "standard"
    ]
    return max(found, default=None)


def _parity(context: Context, model: Target, outcome: Outcomes) -> Gate:
    """Compare torch with the engine on clean images and on the worst adversarial ones."""
    if model.members is None:
        return gates.parity(None)
    pairs, ensemble = [], Ensemble(model.members)
    for pixels in [context.split.images.cpu().numpy(), *outcome.worst.values()]:
        floats = to_float(pixels)
        x = torch.from_numpy(floats).to(context.split.images.device)
        pairs.append((torch_scores(ensemble, x), context.engine.run_all(floats)))
    if (precision := context.engine.card.precision) != "fp32":
        same = [(torch_.predictions == found.predictions).mean() for torch_, found in pairs]
        return gates.variant_parity(float(np.mean(same)), precision)
    return gates.parity([compare(*pair) for pair in pairs])
