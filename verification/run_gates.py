"""The checks of one evaluation: every gate, on what the attacks found."""

from __future__ import annotations

import numpy as np
import torch

from dverge_serve.engine.outputs import Scores
from dverge_serve.engine.report import Gate
from dverge_serve.images import to_float
from export.parity import compare, torch_scores
from training.models.ensemble import Ensemble
from verification import gates
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Outcomes
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import flow
from verification.metrics.robust_accuracy import clean_scores
from verification.self_test import self_test


def check(
    here: Context,
    model: Target,
    outcomes: dict[str, Outcomes],
    control: str,
    last: tuple[Outcomes, Attack, float],
) -> list[Gate]:
    """Return every gate's result, in the report's order.

    Args:
        here: the evaluation.
        model: what it is about.
        outcomes: of all targets by name, the model's first.
        control: what the control is.
        last: outcomes, attack and radius where nothing but chance may be left.
    """
    mine, everyone = outcomes["model"], list(outcomes.values())
    clean = clean_scores(here.engine, here.split)
    backwards = clean_scores(here.engine, here.split.take(torch.arange(len(here.split)).flip(0)))
    again = Scores(backwards.logits[::-1], backwards.member_logits[::-1])
    zero, broken = None, None
    if model.members is not None:
        zero, broken, _ = flow(model.members, here.split, here.suite)
    named = "control" if control == "own" else f"control ({control})"
    return [
        gates.finite(everyone),
        gates.deterministic(clean, again),
        gates.not_probabilities(clean, here.config.labels is not None),
        gates.nonzero_gradient(zero, broken),
        gates.eps_8bit(everyone),
        _parity(here, model, mine),
        gates.grows_with_eps(mine, here.suite, here.eps),
        gates.reaches_chance(*last, classes=len(here.engine.card.labels)),
        gates.iterative_beats_single(mine, here.suite, here.eps),
        gates.converged(mine, here.suite),
        gates.weaker_never_beats(mine, here.suite, here.eps),
        gates.control_falls(outcomes.get("control"), here.suite, here.eps, named),
        gates.surrogates_close(_best_surrogate(here), float(mine.clean.mean())),
        gates.self_test_found(*self_test(here.split, here.config.seed)),
    ]


def _best_surrogate(here: Context) -> float | None:
    """Return the best undefended surrogate's clean accuracy on the test images."""
    pixels = to_float(here.split.images.cpu().numpy())
    x, labels = torch.from_numpy(pixels).to(here.device), here.split.labels.cpu().numpy()
    found = [
        float((torch_scores(Ensemble(each.members), x).predictions == labels).mean())
        for each in here.surrogates
        if each.run.config.method == "standard"
    ]
    return max(found, default=None)


def _parity(here: Context, model: Target, outcome: Outcomes) -> Gate:
    """Compare torch with the engine on clean images and on the worst adversarial ones."""
    if model.members is None:
        return gates.parity(None)
    pairs, ensemble = [], Ensemble(model.members)
    for pixels in [here.split.images.cpu().numpy(), *outcome.worst.values()]:
        floats = to_float(pixels)
        x = torch.from_numpy(floats).to(here.split.images.device)
        pairs.append((torch_scores(ensemble, x), here.engine.run_all(floats)))
    if (precision := here.engine.card.precision) != "fp32":
        same = [(torch_.predictions == found.predictions).mean() for torch_, found in pairs]
        return gates.variant_parity(float(np.mean(same)), precision)
    return gates.parity([compare(*pair) for pair in pairs])
