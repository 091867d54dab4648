"""Rates with intervals, paired comparisons, and areas under the ROC curve."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binomtest, rankdata

from verification.attacks.outcomes import Mask

Floats = npt.NDArray[np.float64]
Z95 = 1.959963984540054


def rate(mask: Mask) -> dict[str, Any]:
    """Return the share of true entries with its Wilson 95% interval.

    Args:
        mask: bool `[n]`; n may be 0, which gives nulls.
    """
    count, n = int(mask.sum()), len(mask)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return {"value": count / n, "low": float(interval.low), "high": float(interval.high), "n": n}


def mcnemar(ours: Mask, theirs: Mask) -> dict[str, Any]:
    """Compare two models on the same images: McNemar's exact test.

    Args:
        ours, theirs: bool `[n]`, which images each model gets right.

    Returns:
        the images only one of them gets right, and the two-sided p-value: how likely a split at
        least this uneven would be if neither were better.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    differ = only_ours + only_theirs
    p_value = float(binomtest(only_ours, differ, 0.5).pvalue) if differ else 1.0
    return {"only_this": only_ours, "only_other": only_theirs, "p_value": p_value}


def auroc(clean: Floats, attacked: Floats) -> dict[str, Any]:
    """Return the chance that an attacked image scores above a clean one, ties counting half.

    The interval is Newcombe's (2006, method 5), 95%, on Hanley and McNeil's variance.

    Args:
        clean, attacked: scores `[n]` and `[m]`; an empty one gives nulls.
    """
    n, m = len(clean), len(attacked)
    if not n or not m:
        return {"value": None, "low": None, "high": None, "clean": n, "attacked": m}
    ranks = rankdata(np.concatenate([clean, attacked]))
    area = float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))
    low, high = _area_interval(area, n, m)
    return {"value": area, "low": low, "high": high, "clean": n, "attacked": m}


def _area_interval(area: float, n: int, m: int) -> tuple[float, float]:
    """Return Newcombe's 95% interval (2006, method 5) of an area under the ROC curve.

    The areas that lie no further from what was found than 1.96 of their own standard errors: a
    score interval, as Wilson's is of a share, and never of no width.
    """
    mean = (n + m) / 2 - 1  # images of either kind, as the method counts them

    def apart(other: float) -> float:
        spread = other * (1 - other)
        spread *= 1 + mean * (1 - other) / (2 - other) + mean * other / (1 + other)
        return abs(area - other) - Z95 * math.sqrt(max(spread, 0.0) / (n * m))

    low = brentq(apart, 0.0, min(area, 1 - 1e-9)) if area > 1e-9 else 0.0
    high = brentq(apart, max(area, 1e-9), 1.0) if area < 1 - 1e-9 else 1.0
    return float(low), float(high)


def quantile_above(scores: Floats, share: float) -> float:
    """Return the threshold that at most `share` of the scores exceed."""
    return float(np.quantile(scores, 1 - share, method="higher"))
