"""The report's figures, from the per-image outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dverge_serve.engine.outputs import Scores
from dverge_serve.images import to_float
from training.data.splits import Split
from verification.attacks.attack import Attack
from verification.attacks.outcomes import VERSIONS, Mask, Outcomes, Pixels
from verification.attacks.rounds import rounds
from verification.attacks.target import Scorer
from verification.metrics.statistics import mcnemar, rate

THREATS = ("transfer", "white_box")  # those with a figure of their own


def figures(outcome: Outcomes, suite: Sequence[Attack], eps: Sequence[float]) -> dict[str, Any]:
    """Return clean and robust accuracy, per radius, threat and attack, with intervals.

    `value` counts images robust both as floats and in 8 bits (`delivered`); `float` and `delivered`
    count one version each. `all` counts whatever was run on an image, which is more on the sample
    that was attacked by queries. `attacks` is the share that survives each attack alone, of its
    sample. `worst` is the one attack that breaks most by itself, of those that were
    run on all images.
    A threat none of whose attacks was run is null.
    """

    def of(threat: str | None, each: float) -> dict[str, Any] | None:
        chosen = [attack for attack in suite if threat in (None, attack.threat)]
        ran = [attack for attack in chosen if outcome.has(attack, each)]
        if not ran:
            return None
        robust: Mask = outcome.robust(ran, each)
        alone = {attack.name: float(_sampled(outcome, attack, each).mean()) for attack in ran}
        everywhere = [each for each in ran if not (each.skip_broken or each.sample)]
        whole = {attack.name: alone[attack.name] for attack in everywhere}
        worst = min(whole or alone, key=alone.__getitem__)
        return {
            **rate(robust),
            "of_clean_correct": rate(robust[outcome.clean])["value"],
            **{version: float(outcome.robust(ran, each, [version]).mean()) for version in VERSIONS},
            "attacks": alone,
            "worst": {"attack": worst, "value": alone[worst]},
        }

    return {
        "clean_accuracy": rate(outcome.clean & ~outcome.invalid),
        "robust_accuracy": [
            {
                "eps": each,
                "transfer": of("transfer", each),
                "white_box": of("white_box", each),
                "all": of(None, each),
            }
            for each in eps
        ],
        "queries": [
            {
                "attack": name,
                "eps": each,
                "total": int(spent.sum()),
                "mean": float(spent[spent > 0].mean()) if (spent > 0).any() else 0.0,
                "largest": int(spent.max()),
            }
            for (name, each), spent in outcome.queries.items()
        ],
    }


def _sampled(outcome: Outcomes, attack: Attack, eps: float) -> Mask:
    """Return which images survive an attack, of those in its sample; of all if it skips some."""
    robust = outcome.robust([attack], eps)
    counted = attack.sample and not attack.skip_broken
    return robust[outcome.ran[attack.name, eps]] if counted else robust


def comparison(
    ours: Outcomes, theirs: Outcomes, suite: Sequence[Attack], eps: Sequence[float]
) -> list[dict[str, Any]]:
    """Compare two models on the same images, clean and under each threat: McNemar's exact test.

    Only attacks that were run on both count, and all rounds: they end by themselves, for either.
    """
    of_rounds = rounds(suite)
    rows = [{"what": "clean", "eps": 0.0, **mcnemar(ours.clean, theirs.clean)}]
    for e in eps:
        for threat in THREATS:
            chosen = [attack for attack in suite if attack.threat == threat]
            both = [each for each in chosen if ours.has(each, e) and theirs.has(each, e)]
            if both:
                counted = both + [each for each in of_rounds if each.threat == threat]
                this, other = ours.robust(counted, e), theirs.robust(counted, e)
                shares = {"this": float(this.mean()), "other": float(other.mean())}
                rows.append({"what": threat, "eps": e, **shares, **mcnemar(this, other)})
    return rows


def combinations(
    outcome: Outcomes, soft: Outcomes, suite: Sequence[Attack], eps: Sequence[float]
) -> list[dict[str, Any]]:
    """Compare mean-logits with mean-softmax under the same attacks, clean and for each threat.

    An image counts for a rule as it does in the report's accuracies: answered rightly when clean
    and after every attack, as floats and in 8 bits. Attacks that skip images which the model, by
    the mean of logits, already answered wrongly would favour the other rule: they do not count.

    Args:
        outcome: of the model as it is, by the mean of logits.
        soft: the same by the mean of softmax.
        suite: the attacks.
        eps: the radii.
    """
    rows = [_row("clean", 0.0, outcome.robust([], 0.0), soft.robust([], 0.0))]
    for threat in THREATS:
        attacks = [each for each in suite if each.threat == threat and not each.skip_broken]
        for each in eps:
            if any(outcome.has(attack, each) for attack in attacks):
                masks = outcome.robust(attacks, each), soft.robust(attacks, each)
                rows.append(_row(threat, each, *masks))
    return rows


def _row(what: str, eps: float, logits: Mask, soft: Mask) -> dict[str, Any]:
    return {
        "what": what,
        "eps": eps,
        "mean_logits": float(logits.mean()),
        "mean_softmax": float(soft.mean()),
        "answers_differ": float((logits != soft).mean()),
    }


def clean_scores(engine: Scorer, split: Split) -> Scores:
    """Return the scores of the clean images."""
    return engine.run_all(to_float(split.images.cpu().numpy()))


def one_by_one(engine: Scorer, images: Pixels) -> tuple[Scores, Scores]:
    """Return the scores of 8-bit images `[n, C, H, W]` in one batch, and of each by itself."""
    floats = to_float(images)
    single = [engine.run_all(image[None]) for image in floats]
    logits = np.concatenate([each.logits for each in single])
    return engine.run_all(floats), Scores(
        logits, np.concatenate([each.member_logits for each in single])
    )
