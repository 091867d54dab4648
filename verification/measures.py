"""Measurements besides accuracy: the alarm, the members, the ways to combine them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.methods.diversity import diversity
from training.models.member import Member
from verification.attacks.cache import cached
from verification.attacks.outcomes import Outcomes
from verification.attacks.target import Target
from verification.context import Context
from verification.gradients import flow
from verification.metrics import detection as alarm
from verification.metrics import transferability as matrices
from verification.metrics.robust_accuracy import combinations
from verification.replay import worst_at
from verification.report.evidence import Gathering

AWARE_STEPS = {"quick": 20, "standard": 50, "full": 100}


def measure(here: Context, model: Target, outcome: Outcomes, evidence: Gathering) -> dict[str, Any]:
    """Measure the alarm, the members' matrices, and the ways to combine the members."""
    attacked = worst_at(outcome, max(here.eps))
    found: dict[str, Any] = {"members": None}
    if model.members is not None:
        members, eps = model.members, max(here.eps)
        steps = AWARE_STEPS[here.config.preset]

        def aware() -> dict[str, Any]:
            return {
                "pixels": alarm.aware(members, here.split, eps, steps=steps, seed=here.config.seed)
            }

        key = ["aware", eps, steps, here.config.seed, here.split.sha256, model.weights]
        if here.config.norm == "linf":
            pixels = cached(key, aware)["pixels"]
            attacked["detector-aware"] = (eps, pixels)
            nothing = np.zeros(pixels.shape, np.float16)
            evidence.add("detector-aware", eps, nothing, pixels)
        if all(isinstance(member, Member) for member in members):
            found["members"] = _matrices(here, members)
    found["disagreement"] = alarm.calibrate(here.engine, here.holdout, here.split) | {
        "alarm": alarm.measure(here.engine, here.holdout, here.split, attacked)
    }
    found["combination"] = combinations(outcome, outcome.by_softmax(), here.suite, here.eps)
    return found


def _matrices(here: Context, members: Sequence[Any]) -> dict[str, Any]:
    middle = sorted(here.eps)[len(here.eps) // 2]
    _, _, norms = flow(members, here.split, here.suite)
    found = {"gradient_norms": norms}
    if here.config.norm == "linf":
        found["transferability"] = matrices.transferability(
            members, here.split, middle, here.config.seed
        )
    found["diversity"] = diversity(members, here.split, here.training.dverge, here.config.seed)
    return found
