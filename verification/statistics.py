"""Rates with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

Mask = npt.NDArray[np.bool_]


def rate(mask: Mask) -> dict[str, Any]:
    """Return the share of true entries with its Wilson 95% interval.

    Args:
        mask: bool `[n]`; n may be 0, which gives nulls.
    """
    count, n = int(mask.sum()), len(mask)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return {
        "value": count / n,
        "low": float(interval.low),
        "high": float(interval.high),
        "n": n,
    }
