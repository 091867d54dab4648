"""Measurements besides accuracy: the alarm, the members, the ways to combine them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dverge_serve.progress import say
from training.methods.diversity import diversity
from training.models.member import Member
from verification.attacks.batches import spread
from verification.attacks.cache import cached
from verification.attacks.outcomes import Outcomes
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import flow
from verification.metrics import detection
from verification.metrics.robust_accuracy import combinations
from verification.metrics.transferability import transferability
from verification.replay import worst_at
from verification.report.evidence import EvidenceWriter


def measure(
    context: Context, model: Target, outcome: Outcomes, evidence: EvidenceWriter
) -> dict[str, Any]:
    """Measure the alarm, the members' matrices, and the ways to combine the members."""
    engine, split, eps = context.engine, context.split, max(context.eps)
    attacked, seed = worst_at(outcome, eps), context.config.seed
    if (members := model.members) is not None and context.config.norm == "linf":
        steps = context.preset.aware_steps
        say("attacking the alarm: an attacker who knows it")
        pixels = cached(
            ["aware", eps, steps, seed, split.sha256, model.weights],
            lambda: {
                "pixels": detection.detector_aware(members, split, eps, steps=steps, seed=seed)
            },
        )["pixels"]
        attacked["detector-aware"] = (eps, pixels)
        evidence.add("detector-aware", eps, np.zeros(pixels.shape, np.float16), pixels)
    ours = members is not None and all(isinstance(member, Member) for member in members)
    return {
        "members": _matrices(context, members) if members is not None and ours else None,
        "disagreement": detection.calibrate(engine, context.holdout, split)
        | {"alarm": detection.measure(engine, context.holdout, split, attacked)},
        "combination": combinations(outcome, outcome.by_softmax(), context.suite, context.eps),
    }


def _matrices(context: Context, members: Sequence[Any]) -> dict[str, Any]:
    say("measuring how the members differ")
    split, seed = context.split, context.config.seed
    split = split.take(spread(split, context.preset.checked))
    found: dict[str, Any] = {"gradient_norms": flow(members, split, context.suite)[2]}
    if context.config.norm == "linf":
        middle = sorted(context.eps)[len(context.eps) // 2]
        found["transferability"] = transferability(members, split, middle, seed)
    return found | {"diversity": diversity(members, split, context.training.dverge, seed)}
