"""The report as data: everything that was asked, found and judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dverge_serve import __version__
from dverge_serve.engine.report_reader import SCHEMA_VERSION
from dverge_serve.files import canonical_json, sha256
from verification import gates
from verification.attacks.outcomes import SOFT, Outcomes
from verification.config import Setting
from verification.gates import Gate
from verification.metrics.robust_accuracy import comparison, figures

OUT_OF_SCOPE = (
    "attacks larger than the stated eps, other norms, patches, rotations and physical attacks",
    "poisoned training data, model theft, privacy of the training images",
    "attackers who adapt to more than the weights and the alarm of this model",
    "attackers who query for labels alone and follow the decision boundary",
)
NO_QUERIES = "attackers who query the service many times (no query-based attack in this preset)"


def assemble(
    here: Setting,
    outcomes: dict[str, Outcomes],
    control: str,
    checks: Sequence[Gate],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Return the report as its schema has it, without evidence, live service and `run`.

    Args:
        here: the evaluation.
        outcomes: of all targets by name.
        control: what the control is.
        checks: every gate's result.
        measured: what else was measured, merged into it.
    """
    asked, card, gradients = here.asked, here.engine.card, here.gradients
    queries = any(attack.threat == "queries" for attack in here.suite)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": gates.verdict(checks),
        "preset": asked.preset,
        "model": {
            "file": asked.model.name,
            "sha256": here.engine.sha256,
            "name": card.name,
            "members": card.members,
            "precision": card.precision,
            "weights_sha256": card.weights_sha256,
            "labels": list(card.labels),
            "gradients": gradients.origin if gradients else "none",
            "foreign": asked.labels is not None,
        },
        "threat_model": {
            "goal": "untargeted: any wrong answer",
            "norm": "Linf" if asked.norm == "linf" else "L2",
            "eps": list(here.eps),
            "transfer": "knows the training data, architecture and schedule, not the weights",
            "queries": "asks the model for scores; tried on images that nothing else broke, and "
            "counted among all attacks alone",
            "white_box": "knows the weights",
            "delivered": "adversarial images rounded to 8 bits inside the eps ball",
            "float": "unrounded (changes kept in float16), to set beside published figures",
            "robust": "right when clean and after every attack, float and delivered",
        },
        "data": {
            "name": here.config.data.name,
            "part": "test",
            "n": len(here.split),
            "sha256": here.split.sha256,
            "train_sha256": here.data.train.sha256,
            "training_known": here.training_known,
        },
        **figures(outcomes["model"], here.suite, here.eps),
        "control": None,
        "against": None,
        "gates": [check.to_json() for check in checks],
        **measured,
        "attacks": [attack.to_json() for attack in here.suite],
        "surrogates": [surrogate.to_json() for surrogate in here.surrogates],
        "left_out": list(here.left_out),
        "seed": asked.seed,
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()}
        | {SOFT: outcomes["model"].by_softmax().to_json()},
        "out_of_scope": [*OUT_OF_SCOPE, *([] if queries else [NO_QUERIES])],
        "tool_version": __version__,
    }
    if "control" in outcomes:
        report["control"] = {"what": control} | figures(outcomes["control"], here.suite, here.eps)
    if here.against is not None:
        rows = comparison(outcomes["model"], outcomes["against"], here.suite, here.eps)
        report["against"] = {
            "file": here.against.path.name,
            "sha256": here.against.sha256,
            **figures(outcomes["against"], here.suite, here.eps),
            "comparison": rows,
        }
    report["configuration_sha256"] = sha256(
        canonical_json([report["attacks"], list(here.eps), asked.seed, report["surrogates"]])
    )
    return report


def nulls(value: Any) -> Any:
    """Return a part of a report with None for whatever is not a number, as a broken model's is."""
    if isinstance(value, dict):
        return {key: nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
