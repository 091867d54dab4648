"""Other rules of combining the members' answers, under the same attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dverge_serve.engine.outputs import Floats, Scores
from dverge_serve.engine.session import Engine
from training.data.splits import Split
from verification.attacks.attack import Attack
from verification.attacks.outcomes import Outcomes
from verification.attacks.suite import Source, run_suite
from verification.attacks.target import Target
from verification.gradients import Gradients


def mean_softmax(scores: Scores) -> Floats:
    """Return the mean of the members' probabilities, as the paper combines them."""
    return np.asarray(scores.member_probabilities.mean(axis=1), dtype=np.float32)


def vote(scores: Scores) -> Floats:
    """Return the members' votes for each class; the mean probability settles ties."""
    classes = scores.logits.shape[1]
    votes = (scores.votes[:, :, None] == np.arange(classes)).sum(axis=1)
    return np.asarray(votes + 0.5 * scores.member_probabilities.mean(axis=1), dtype=np.float32)


RULES: dict[str, Callable[[Scores], Floats]] = {
    "mean-logits": lambda scores: scores.logits,
    "mean-softmax": mean_softmax,
    "vote": vote,
}


class Combined:
    """The engine's members combined by one rule, whose largest class is the answer."""

    def __init__(self, engine: Engine, rule: Callable[[Scores], Floats]) -> None:
        self._engine, self._rule = engine, rule

    def run_all(self, images: npt.NDArray[np.float32]) -> Scores:
        """Return the scores of float32 images `[N, C, H, W]`."""
        scores = self._engine.run_all(images)
        return Scores(self._rule(scores), scores.member_logits)


def under_attack(
    engine: Engine,
    model: Gradients,
    suite: Sequence[Attack],
    sources: Mapping[str, Source],
    split: Split,
    eps: Sequence[float],
    seed: int,
) -> dict[str, Outcomes]:
    """Return each image's outcomes under each rule.

    The gradient attacks that aim at the mean of logits and at the mean of softmax are pooled, so
    that no rule meets weaker attacks than another; none aims at the vote, which has no gradient.
    Attacks that ask the model are left out: each rule would be sent other images.
    """
    pooled = [each for each in suite if not each.asks and each.only_eps is None]
    found = {}
    for name, rule in RULES.items():  # one by one: the first target alone meets every attack
        target = Target(Combined(engine, rule), model.members, model.weights)
        found[name] = run_suite(pooled, sources, {name: target}, split, eps, seed=seed)[name]
    return found
