"""The report as JSON: settings, figures and gates in the order of its schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dverge_serve import __version__
from dverge_serve.engine.report import NORMS, SCHEMA_VERSION, Gate
from dverge_serve.engine.session import Engine
from dverge_serve.files import canonical_json, sha256
from verification import gates
from verification.attacks.outcomes import SOFT, Outcomes
from verification.context import Context
from verification.foreign_model import ForeignEngine
from verification.metrics.by_queries import by_queries
from verification.metrics.robust_accuracy import comparison, figures
from verification.taxonomies import IDENTIFIERS

OUT_OF_SCOPE = (
    "attacks larger than the stated eps, other norms, patches, rotations and physical attacks",
    "poisoned training data, backdoors whose trigger nobody knows, privacy of the training images",
    "attackers who query for longer than the numbers stated",
    "attackers who adapt to more than the weights and the alarm of this model",
)


def assemble(
    context: Context,
    outcomes: dict[str, Outcomes],
    control: str,
    checks: Sequence[Gate],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Return the report as its schema has it, without `evidence`, `live` and `run`.

    Args:
        context: of the verification.
        outcomes: of all targets by name.
        control: `own`, a surrogate's name or `none`.
        checks: every gate's result.
        measured: the other measurements, merged into it.
    """
    config, card, gradients = context.config, context.engine.card, context.gradients
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "verdict": gates.verdict(checks),
        "preset": config.preset,
        "model": {
            "file": config.model.name,
            "sha256": context.engine.sha256,
            "name": card.name,
            "members": card.members,
            "precision": card.precision,
            "weights_sha256": card.weights_sha256,
            "labels": list(card.labels),
            "gradients": gradients.origin if gradients else "none",
            "foreign": config.labels is not None,
            **_contract(context.engine),
            # Networks whose attacks it has learnt from; no surrogate is one of them.
            **{key: card.training[key] for key in ("source_models",) if key in card.training},
        },
        "threat_model": {
            "goal": "untargeted: any wrong answer",
            "norm": NORMS[config.norm],
            "eps": list(context.eps),
            "eps_given": list(context.eps_given),
            "eps_auto": config.auto_eps,  # found where the control falls, on some of these images
            "transfer": "knows the training data alone"
            if config.labels is not None
            else "knows the training data, architecture and schedule, not the weights",
            "queries": "asks the model, for scores or for labels alone, or trains a substitute "
            "on its answers; on a random sample of the images",
            "white_box": "knows the weights",
            "delivered": "adversarial images rounded to 8 bits inside the eps ball",
            "float": "unrounded (changes kept in float16), to set beside published figures",
            "robust": "right when clean and after every attack, float and delivered",
        },
        "identifiers": IDENTIFIERS,
        "data": {
            "name": context.training.data.name,
            "part": "test",
            "n": len(context.split),
            "sha256": context.split.sha256,
            "train_sha256": context.data.train.sha256,
            "training_known": context.training_known,
        },
        **figures(outcomes["model"], context.suite, context.eps),
        "by_queries": by_queries(outcomes["model"], context.suite, context.eps),
        "control": None,
        "against": None,
        "gates": [check.to_json() for check in checks],
        **measured,
        "attacks": [attack.to_json() for attack in context.suite],
        "surrogates": [
            each.to_json() | {"clean_accuracy": context.surrogate_accuracy[each.name]}
            for each in context.surrogates
        ],
        "left_out": list(context.left_out),
        "seed": config.seed,
        "outcomes": {name: outcome.to_json() for name, outcome in outcomes.items()}
        | {SOFT: outcomes["model"].by_softmax().to_json()},
        "out_of_scope": list(OUT_OF_SCOPE),
        "tool_version": __version__,
    }
    if "control" in outcomes:
        found = figures(outcomes["control"], context.suite, context.eps)
        report["control"] = {"what": control} | found
    if context.against is not None:
        rows = comparison(outcomes["model"], outcomes["against"], context.suite, context.eps)
        report["against"] = {
            "file": context.against.path.name,
            "sha256": context.against.sha256,
            **figures(outcomes["against"], context.suite, context.eps),
            "comparison": rows,
        }
    surrogates = [each.to_json() for each in context.surrogates]
    shaped = [report["attacks"], list(context.eps), config.seed, surrogates]
    contract = report["model"].get("contract")  # of a foreign classifier
    report["configuration_sha256"] = sha256(canonical_json([*shaped, contract]))
    return report


def _contract(engine: Engine | ForeignEngine) -> dict[str, Any]:
    """Return a foreign classifier's contract, and how it was found."""
    if not isinstance(engine, ForeignEngine):
        return {}
    assert engine.found is not None
    return {"contract": engine.contract.to_json(), "contract_found": engine.found.to_json()}


def nulls(value: Any) -> Any:
    """Return a part of a report with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
