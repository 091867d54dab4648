"""Clean accuracy on more test images than are attacked: answers cost little, attacks much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from dverge_serve.progress import say
from training.data.splits import Split, load_test
from verification.attacks.target import Target
from verification.context import Context
from verification.metrics.robust_accuracy import clean_scores
from verification.metrics.statistics import rate

MOST = 10_000  # images
MOST_BYTES = 1 << 30  # as float32


def more_clean_images(context: Context, targets: Mapping[str, Target]) -> dict[str, Any] | None:
    """Return clean accuracies on up to 10,000 test images, the attacked ones among them.

    Args:
        context: of the verification.
        targets: `model` and, where there is one, `control`.

    Returns:
        each one's rate (null without a control); None where no more images are there.
    """
    attacked = context.split.images
    limit = min(MOST, MOST_BYTES // (4 * prod(attacked.shape[1:])))
    limit = min(limit, context.training.data.test_limit or limit)  # the recipe's own
    if context.attacked.test_limit == 0 or limit <= len(attacked):
        return None
    _, split = load_test(replace(context.attacked, test_limit=limit))
    if len(split) <= len(attacked):
        return None
    say(f"answering {len(split):,} clean test images")
    return {
        name: _right(targets[name], split) if name in targets else None
        for name in ("model", "control")
    }


def _right(target: Target, split: Split) -> dict[str, Any]:
    logits = clean_scores(target.engine, split).logits
    right = logits.argmax(1) == split.labels.numpy()
    return rate(right & np.isfinite(logits).all(1))
